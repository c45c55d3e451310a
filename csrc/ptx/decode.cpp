// Places a module's variables, and decodes the functions that a launch needs.
#include "csrc/ptx/decode.h"

#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

uint64_t round_up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

bool has_host_address(const Symbol& symbol) {
  return symbol.space == Space::kGlobal || symbol.space == Space::kConst;
}

// Shared memory whose size the launch decides.
bool is_dynamic(const Symbol& symbol) { return symbol.is_extern || symbol.size == 0; }

int immediate_row(Function& function, uint64_t value) {
  const auto [entry, is_new] =
      function.immediate_rows.try_emplace(value, static_cast<int>(function.immediates.size()));
  if (is_new) function.immediates.push_back(value);
  return entry->second;
}

// A float literal by the format of the instruction it stands in.
uint64_t immediate_bits(const ParsedOperand& operand, Type type) {
  if (!operand.is_float) return operand.integer;
  switch (type) {
    case Type::kF64:
      return operand.float_bits == 64 ? operand.integer : std::bit_cast<uint64_t>(operand.real);
    case Type::kF16:
    case Type::kBF16:
      return encode_float(operand.real, type, Rounding::kRn, false);
    case Type::kF32:
    case Type::kTF32:
      break;
    default:
      if (operand.float_bits) return operand.integer;
  }
  if (operand.float_bits == 32) return operand.integer;
  return std::bit_cast<uint32_t>(static_cast<float>(operand.real));
}

class InstructionDecoder {
 public:
  InstructionDecoder(Program& program, Function& function, const ParsedInstruction& parsed,
                     Instruction& instruction)
      : program_(program), function_(function), parsed_(parsed), instruction_(instruction) {}

  void run() {
    instruction_.source = &parsed_;
    instruction_.guard = parsed_.has_guard ? parsed_.guard : -1;
    instruction_.guard_negated = parsed_.guard_negated;
    instruction_.name = number_of(statistics_name());
    decode_modifiers();
    if (decode_control_flow()) return;
    decode_operands();
    if (decode_barrier()) return;
    for (const Decoder decoder : kDecoders) {
      instruction_.control = Control::kNone;
      if (decoder(parsed_, instruction_) && instruction_.execute) return;
    }
    instruction_.control = Control::kNone;
    instruction_.execute = [](Warp& warp, const Instruction& instruction, uint32_t mask) {
      warp.fail(instruction, std::countr_zero(mask), "unknown or unsupported instruction");
    };
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw Error(concat("kernel ", function_.name, ", PTX line ", parsed_.line, ": ", message, ": ",
                       parsed_.text));
  }

  // The opcode with the modifiers that make it another kind of work.
  std::string statistics_name() const {
    static constexpr std::string_view kTelling[] = {
        "global", "shared", "local",     "param",  "const",    "sync",       "async",       "bulk",
        "tensor", "wide",   "mma_async", "arrive", "try_wait", "wait_group", "commit_group"};
    std::string name = parsed_.opcode;
    for (const std::string& modifier : parsed_.modifiers)
      if (std::find(std::begin(kTelling), std::end(kTelling), modifier) != std::end(kTelling) ||
          modifier.starts_with("shared::"))
        name += "." + modifier;
    return name;
  }

  int number_of(const std::string& name) {
    const auto [entry, is_new] = program_.name_numbers.try_emplace(
        name, static_cast<int>(program_.instruction_names.size()));
    if (is_new) program_.instruction_names.push_back(name);
    return entry->second;
  }

  void decode_modifiers() {
    static constexpr std::pair<std::string_view, bool Instruction::*> kFlags[] = {
        {"ftz", &Instruction::ftz},         {"sat", &Instruction::sat},
        {"relu", &Instruction::relu},       {"NaN", &Instruction::nan},
        {"xorsign", &Instruction::xorsign}, {"abs", &Instruction::abs}};
    static constexpr std::pair<std::string_view, Rounding> kRoundings[] = {
        {"rn", Rounding::kRn},   {"rz", Rounding::kRz},   {"rm", Rounding::kRm},
        {"rp", Rounding::kRp},   {"rni", Rounding::kRni}, {"rzi", Rounding::kRzi},
        {"rmi", Rounding::kRmi}, {"rpi", Rounding::kRpi}};
    for (const std::string& modifier : parsed_.modifiers) {
      if (const Type type = parse_type(modifier); type != Type::kNone) instruction_.type = type;
      for (const auto& [name, flag] : kFlags)
        if (modifier == name) instruction_.*flag = true;
      for (const auto& [name, rounding] : kRoundings)
        if (modifier == name) instruction_.rounding = rounding;
    }
  }

  bool decode_control_flow() {
    const std::string& opcode = parsed_.opcode;
    if (opcode == "bra") {
      instruction_.control = Control::kBranch;
      instruction_.target = find_label(parsed_.operands[0].name);
    } else if (opcode == "brx") {
      instruction_.control = Control::kIndexedBranch;
      instruction_.operands[0] = decode_operand(parsed_.operands[0], Type::kU32);
      const auto targets = function_.branch_targets.find(parsed_.operands[1].name);
      if (targets == function_.branch_targets.end()) fail("unknown branch targets");
      for (const std::string& label : targets->second)
        instruction_.targets.push_back(find_label(label));
    } else if (opcode == "call") {
      decode_call();
    } else if (opcode == "ret") {
      instruction_.control = Control::kReturn;
    } else if (opcode == "exit") {
      instruction_.control = Control::kExit;
    } else if (opcode == "nanosleep") {
      instruction_.control = Control::kYield;
    } else if (opcode == "trap") {
      instruction_.execute = [](Warp& warp, const Instruction& instruction, uint32_t mask) {
        const std::string& why = warp.launch->last_printed;
        warp.fail(instruction, std::countr_zero(mask),
                  why.empty() ? "trap executed" : "trap executed after printing " + why);
      };
    } else {
      return false;
    }
    return true;
  }

  int find_label(const std::string& label) const {
    const int target = function_.find_label(label, parsed_.scope);
    if (target < 0) fail("unknown label " + label);
    return target;
  }

  // Results first, then arguments; Instruction::immediate is the number of results.
  void decode_call() {
    instruction_.control = Control::kCall;
    function_.has_calls = true;
    const ParsedOperand& called = parsed_.operands[0];
    if (called.kind == OperandKind::kName) {
      const auto found = program_.module.functions.find(called.name);
      if (found == program_.module.functions.end()) fail("call of an unknown function");
      instruction_.callee = found->second.get();
    } else {
      instruction_.operands[0] = decode_operand(called, Type::kU64);
    }
    for (const auto* list : {&parsed_.call_results, &parsed_.call_arguments})
      for (const ParsedOperand& operand : *list)
        instruction_.elements.push_back(decode_call_operand(operand));
    instruction_.immediate = static_cast<int>(parsed_.call_results.size());
  }

  Operand decode_call_operand(const ParsedOperand& operand) {
    if (operand.kind != OperandKind::kSymbol || operand.symbol->space != Space::kParam)
      return decode_operand(operand, Type::kB64);
    Operand variable;
    variable.kind = OperandKind::kSymbol;
    variable.index = static_cast<int>(operand.symbol->address);
    variable.offset = static_cast<int64_t>(operand.symbol->size);
    return variable;
  }

  void decode_operands() {
    // wgmma and bulk copies may have more, which their decoders read from the parsed instruction.
    const size_t most = instruction_.operands.size();
    if (parsed_.operands.size() > most && parsed_.opcode != "wgmma" && parsed_.opcode != "cp")
      fail("too many operands");
    instruction_.num_operands = static_cast<int>(std::min(parsed_.operands.size(), most));
    for (size_t k = 0; k < static_cast<size_t>(instruction_.num_operands); k++)
      instruction_.operands[k] = decode_operand(parsed_.operands[k], instruction_.type);
    instruction_.has_second_output = parsed_.has_second_output;
    if (parsed_.has_second_output)
      instruction_.second_output = decode_operand(parsed_.second_output, instruction_.type);
  }

  Operand decode_operand(const ParsedOperand& parsed, Type type) {
    Operand operand;
    operand.kind = parsed.kind;
    operand.negated = parsed.negated;
    switch (parsed.kind) {
      case OperandKind::kRegister:
        operand.index = parsed.index + kSinkRows;
        operand.width =
            static_cast<uint8_t>(function_.register_widths[static_cast<size_t>(parsed.index)]);
        break;
      case OperandKind::kPredicate:
        operand.index = parsed.index;
        operand.width = 4;
        break;
      case OperandKind::kSink:
        break;
      case OperandKind::kImmediate:
        operand.bank = Bank::kImmediates;
        operand.index = immediate_row(function_, immediate_bits(parsed, type));
        break;
      case OperandKind::kSpecialRegister:
        operand.bank = Bank::kSpecialRegisters;
        operand.index = parsed.index;
        break;
      case OperandKind::kSymbol:
        operand.bank = Bank::kImmediates;
        operand.in_frame = parsed.symbol->space == Space::kLocal;
        operand.index = immediate_row(function_, address_of(*parsed.symbol, parsed.offset));
        break;
      case OperandKind::kName:
        operand.bank = Bank::kImmediates;
        operand.index = immediate_row(function_, value_of_name(parsed));
        break;
      case OperandKind::kVector:
        decode_vector(parsed, type, operand);
        break;
      case OperandKind::kAddress:
        operand = decode_operand(parsed.elements[0], Type::kU64);
        operand.kind = OperandKind::kAddress;
        operand.offset = parsed.offset;
        if (parsed.elements.size() > 1 && parsed.elements[1].kind == OperandKind::kVector)
          decode_vector(parsed.elements[1], Type::kU32, operand);
        break;
      case OperandKind::kNone:
        fail("operand");
    }
    return operand;
  }

  void decode_vector(const ParsedOperand& parsed, Type type, Operand& operand) {
    std::vector<Operand> elements;
    for (const ParsedOperand& element : parsed.elements)
      elements.push_back(decode_operand(element, type));
    operand.first = static_cast<uint16_t>(instruction_.elements.size());
    operand.count = static_cast<uint16_t>(elements.size());
    instruction_.elements.insert(instruction_.elements.end(), elements.begin(), elements.end());
  }

  uint64_t address_of(const Symbol& symbol, int64_t offset) const {
    uint64_t base = 0;
    if (symbol.space == Space::kShared) base = kSharedBase;
    if (symbol.space == Space::kLocal) base = kLocalBase;
    return symbol.address + static_cast<uint64_t>(offset) + base;
  }

  // Of a function, or of a variable declared behind its use.
  uint64_t value_of_name(const ParsedOperand& operand) const {
    for (size_t k = 0; k < program_.functions.size(); k++)
      if (program_.functions[k]->name == operand.name) return kFunctionBase + k;
    const auto found = program_.module.symbols.find(operand.name);
    if (found == program_.module.symbols.end()) fail("unknown name " + operand.name);
    return address_of(*found->second, operand.offset);
  }

  bool decode_barrier() {
    const bool is_barrier = parsed_.opcode == "bar" || parsed_.opcode == "barrier";
    if (!is_barrier || parsed_.has("warp")) return false;
    instruction_.aligned = parsed_.opcode == "bar" || parsed_.has("aligned");
    if (parsed_.has("cluster")) {
      instruction_.control = Control::kClusterBarrier;
      instruction_.barrier_part = parsed_.has("wait") ? BarrierPart::kWait : BarrierPart::kArrive;
      return true;
    }
    instruction_.control = Control::kBarrier;
    if (parsed_.has("arrive")) instruction_.barrier_part = BarrierPart::kArrive;
    if (parsed_.has("red")) {
      instruction_.barrier_part = BarrierPart::kReduce;
      instruction_.reduction = parsed_.has("popc")  ? Reduction::kAdd
                               : parsed_.has("and") ? Reduction::kAnd
                                                    : Reduction::kOr;
    }
    return true;
  }

  Program& program_;
  Function& function_;
  const ParsedInstruction& parsed_;
  Instruction& instruction_;
};

void visit_symbols(const ParsedOperand& operand, std::vector<Symbol*>& shared) {
  if (operand.symbol && operand.symbol->space == Space::kShared) shared.push_back(operand.symbol);
  for (const ParsedOperand& element : operand.elements) visit_symbols(element, shared);
}

// The .shared variables that a function mentions or declares.
std::vector<Symbol*> shared_symbols(const Function& function) {
  std::vector<Symbol*> found;
  for (const ParsedInstruction& instruction : function.parsed) {
    for (const ParsedOperand& operand : instruction.operands) visit_symbols(operand, found);
    for (const ParsedOperand& operand : instruction.call_arguments) visit_symbols(operand, found);
  }
  for (const std::unique_ptr<Symbol>& variable : function.variables)
    if (variable->space == Space::kShared && !variable->is_extern) found.push_back(variable.get());
  return found;
}

const ParsedInstruction& end_of_function() {
  static const ParsedInstruction end = [] {
    ParsedInstruction instruction;
    instruction.opcode = "ret";
    instruction.text = "<end of function>";
    return instruction;
  }();
  return end;
}

}  // namespace

AlignedBytes::AlignedBytes(size_t bytes) {
  constexpr size_t kAlignment = 1024;
  storage_.resize(bytes + kAlignment);
  const auto address = reinterpret_cast<uintptr_t>(storage_.data());
  data_ = storage_.data() + (round_up(address, kAlignment) - address);
}

void Program::place() {
  std::vector<Symbol*> variables = module.symbols_in_order;
  for (const auto& [name, function] : module.functions) {
    functions.push_back(function.get());
    for (const std::unique_ptr<Symbol>& variable : function->variables)
      variables.push_back(variable.get());
  }
  std::erase_if(variables, [](const Symbol* symbol) { return !has_host_address(*symbol); });
  for (Symbol* symbol : variables) {
    const uint64_t bytes = std::max<uint64_t>(symbol->size, 1);
    uint8_t* data = storage.emplace_back(bytes).data();
    std::copy(symbol->initial.begin(), symbol->initial.end(), data);
    symbol->address = reinterpret_cast<uint64_t>(data);
    symbol->placed = true;
    ranges.push_back({symbol->address, symbol->address + bytes, symbol->space == Space::kConst,
                      symbol->space, "variable " + symbol->name});
  }
  for (const Symbol* symbol : variables)
    for (const Symbol::Relocation& relocation : symbol->relocations) {
      uint64_t value = 0;
      const auto found = module.symbols.find(relocation.symbol);
      if (found != module.symbols.end() && found->second->placed)
        value = found->second->address + static_cast<uint64_t>(relocation.addend);
      for (size_t k = 0; k < functions.size(); k++)
        if (functions[k]->name == relocation.symbol) value = kFunctionBase + k;
      std::memcpy(reinterpret_cast<uint8_t*>(symbol->address) + relocation.offset, &value,
                  sizeof value);
    }
}

void Program::decode(Function& function) {
  if (!function.code.empty()) return;
  // Variables of device functions lie first, in one place for all; each kernel lays out its own
  // window behind them.
  uint64_t& used = function.is_entry ? function.shared_bytes : function_shared_bytes;
  if (function.is_entry) used = function_shared_bytes;
  const std::vector<Symbol*> shared = shared_symbols(function);
  std::vector<Symbol*> placed_here;
  uint64_t dynamic_alignment = 16;
  for (Symbol* symbol : shared) {
    const auto alignment = static_cast<uint64_t>(symbol->alignment);
    if (is_dynamic(*symbol)) {
      dynamic_alignment = std::max(dynamic_alignment, alignment);
      function.uses_dynamic_shared = true;
    } else if (!symbol->placed) {
      symbol->address = round_up(used, alignment);
      symbol->placed = true;
      used = symbol->address + symbol->size;
      placed_here.push_back(symbol);
    }
  }
  for (const Symbol* symbol : shared)
    if (symbol->placed)
      function.shared_bytes = std::max(function.shared_bytes, symbol->address + symbol->size);
  if (function.uses_dynamic_shared)
    function.shared_bytes = round_up(function.shared_bytes, dynamic_alignment);
  for (Symbol* symbol : shared)
    if (is_dynamic(*symbol)) symbol->address = function.shared_bytes;

  std::vector<Instruction> code(function.parsed.size() + 1);
  for (size_t k = 0; k < function.parsed.size(); k++)
    InstructionDecoder(*this, function, function.parsed[k], code[k]).run();
  code.back().control = Control::kReturn;
  code.back().source = &end_of_function();
  function.code = std::move(code);
  if (function.is_entry)
    for (Symbol* symbol : placed_here) symbol->placed = false;
  immediate_row(function, 0);
  for (const uint64_t value : function.immediates)
    function.immediate_bank.insert(function.immediate_bank.end(), kWarpSize, value);
}

Function* Program::find_kernel(const std::string& name) {
  std::string known;
  for (Function* function : functions) {
    if (!function->is_entry || !function->has_body) continue;
    if (function->name == name || demangle(function->name) == name) return function;
    known += "\n  " + function->name;
  }
  throw Error(concat("no kernel is named '", name, "'; kernels:", known));
}

}  // namespace mergeme::ptx
