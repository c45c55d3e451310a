// Registers, variables with their initialisers, and parameters.
#include "csrc/ptx/literals.h"
#include "csrc/ptx/module_parser.h"
#include "csrc/ptx/numbers.h"

namespace mergeme::ptx {
namespace {

Space parse_space(std::string_view word) {
  if (word == ".global") return Space::kGlobal;
  if (word == ".const") return Space::kConst;
  if (word == ".shared") return Space::kShared;
  if (word == ".local") return Space::kLocal;
  if (word == ".param") return Space::kParam;
  return Space::kGeneric;
}

int parse_vector_size(std::string_view word) {
  if (word == ".v2") return 2;
  if (word == ".v4") return 4;
  if (word == ".v8") return 8;
  return 1;
}

uint64_t round_up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

uint64_t initial_bits(const ParsedOperand& value, Type type) {
  if (type == Type::kF32 && value.is_float && value.float_bits != 32)
    return std::bit_cast<uint32_t>(static_cast<float>(value.real));
  if (type == Type::kF64 && value.is_float && value.float_bits != 64)
    return std::bit_cast<uint64_t>(value.real);
  return value.integer;
}

void reserve_element(Symbol& variable, uint64_t index, uint64_t bytes) {
  variable.initial.resize(std::max(variable.initial.size(), (index + 1) * bytes));
}

}  // namespace

void ModuleParser::parse_registers() {
  Type type = Type::kNone;
  while (tokens_.is_directive()) {
    const std::string_view word = tokens_.next().text;
    if (parse_vector_size(word) != 1) tokens_.fail("vector registers are not supported");
    type = parse_type(word.substr(1));
  }
  if (type == Type::kNone) tokens_.fail("unknown register type");
  const int rows = type == Type::kB128 ? 2 : 1;
  do {
    const std::string name(tokens_.expect_word());
    Registers registers{0, 1, type};
    const bool numbered = tokens_.accept("<");
    if (numbered) {
      registers.count = static_cast<int>(tokens_.constant());
      tokens_.expect(">");
    }
    if (type == Type::kPred) {
      registers.first = function_->num_predicates;
      function_->num_predicates += registers.count;
    } else {
      std::vector<int>& widths = function_->register_widths;
      registers.first = static_cast<int>(widths.size());
      widths.insert(widths.end(), static_cast<size_t>(registers.count * rows),
                    std::min(size_of(type), 8));
    }
    Scope& scope = scopes_.back();
    (numbered ? scope.numbered_registers : scope.registers)[name] = registers;
  } while (tokens_.accept(","));
  tokens_.expect(";");
}

void ModuleParser::parse_module_variables(bool is_extern) {
  const Space space = parse_space(tokens_.expect_word());
  for (std::unique_ptr<Symbol>& variable : parse_variables(space, is_extern)) {
    std::unique_ptr<Symbol>& slot = module_.symbols[variable->name];
    if (!slot) {
      module_.symbols_in_order.push_back(variable.get());
      slot = std::move(variable);
    } else if (!slot->size || variable->size) {  // a definition replaces its declaration
      *slot = *variable;
    }
  }
  tokens_.expect(";");
}

void ModuleParser::parse_function_variables() {
  const bool is_extern = tokens_.accept(".extern");
  const Space space = parse_space(tokens_.expect_word());
  for (std::unique_ptr<Symbol>& variable : parse_variables(space, is_extern)) {
    const auto place = [&](uint64_t& used, uint64_t alignment) {
      variable->address = round_up(used, alignment);
      used = variable->address + variable->size;
      variable->placed = true;
    };
    if (space == Space::kLocal)
      place(function_->local_bytes, static_cast<uint64_t>(variable->alignment));
    if (space == Space::kParam) place(function_->param_bytes, 16);
    scopes_.back().symbols[variable->name] = variable.get();
    function_->variables.push_back(std::move(variable));
  }
  tokens_.expect(";");
}

// What stands between the space and the name; alignment 0 if none is given.
Symbol ModuleParser::parse_variable_attributes(int& vector_size) {
  Symbol attributes;
  attributes.alignment = 0;
  attributes.type = Type::kNone;
  while (tokens_.is_directive()) {
    const std::string_view word = tokens_.next().text;
    if (word == ".align")
      attributes.alignment = static_cast<int>(tokens_.constant());
    else if (word == ".attribute")
      tokens_.skip_past(")");
    else if (word == ".texref" || word == ".samplerref" || word == ".surfref")
      attributes.type = Type::kB64;
    else if (parse_vector_size(word) != 1)
      vector_size = parse_vector_size(word);
    else if (const Type type = parse_type(word.substr(1)); type != Type::kNone)
      attributes.type = type;
    else if (word != ".ptr" && parse_space(word) == Space::kGeneric)
      tokens_.fail("unknown variable attribute");
  }
  return attributes;
}

std::vector<std::unique_ptr<Symbol>> ModuleParser::parse_variables(Space space, bool is_extern) {
  int vector_size = 1;
  const Symbol attributes = parse_variable_attributes(vector_size);
  const int element_bytes = size_of(attributes.type) * vector_size;
  std::vector<std::unique_ptr<Symbol>> variables;
  do {
    auto variable = std::make_unique<Symbol>(attributes);
    variable->space = space;
    variable->is_extern = is_extern;
    variable->name = tokens_.expect_word();
    if (!variable->alignment) variable->alignment = std::max(element_bytes, 1);
    parse_declarator(*variable, element_bytes);
    variables.push_back(std::move(variable));
  } while (tokens_.accept(","));
  return variables;
}

// [2][3] as 6; [] leaves the extent to the initialiser, or to the launch.
uint64_t ModuleParser::parse_extents(bool& open) {
  uint64_t count = 1;
  while (tokens_.accept("[")) {
    if (tokens_.is("]")) {
      open = true;
      count = 0;
    } else {
      count *= static_cast<uint64_t>(tokens_.constant());
    }
    tokens_.expect("]");
  }
  return count;
}

void ModuleParser::parse_declarator(Symbol& variable, int element_bytes) {
  bool open = false;
  uint64_t count = parse_extents(open);
  if (tokens_.is("<")) tokens_.fail("parameterised variables are not supported");
  if (tokens_.accept("=")) {
    uint64_t index = 0;
    parse_initializer(variable, index);
    if (open) count = index;
  }
  variable.size = count * static_cast<uint64_t>(element_bytes);
  if (!variable.initial.empty()) reserve_element(variable, 0, variable.size);
}

void ModuleParser::parse_initializer(Symbol& variable, uint64_t& index) {
  if (tokens_.accept("{")) {
    if (!tokens_.is("}")) {
      do parse_initializer(variable, index);
      while (tokens_.accept(","));
    }
    tokens_.expect("}");
    return;
  }
  if (tokens_.is_word()) {
    parse_address_initializer(variable, index++);
    return;
  }
  if (tokens_.peek(1).text == "(")
    tokens_.fail("masked addresses in initialisers are not supported");
  const ParsedOperand value = parse_operand();
  const auto bytes = static_cast<uint64_t>(size_of(variable.type));
  const uint64_t bits = initial_bits(value, variable.type);
  reserve_element(variable, index, bytes);
  std::memcpy(&variable.initial[index * bytes], &bits, std::min<uint64_t>(bytes, sizeof bits));
  index++;
}

// name, name + 4, generic(name) or generic(name + 4)
void ModuleParser::parse_address_initializer(Symbol& variable, uint64_t index) {
  std::string name(tokens_.expect_word());
  int64_t addend = 0;
  if (name == "generic" && tokens_.accept("(")) {
    name = tokens_.expect_word();
    addend += tokens_.offset();
    tokens_.expect(")");
  }
  addend += tokens_.offset();
  const auto bytes = static_cast<uint64_t>(size_of(variable.type));
  reserve_element(variable, index, bytes);
  variable.relocations.push_back({index * bytes, std::move(name), addend});
}

void ModuleParser::parse_parameters(std::vector<FunctionParameter>& parameters, int& bytes) {
  tokens_.expect("(");
  int used = 0;
  if (!tokens_.is(")")) {
    do {
      const std::string_view space = tokens_.expect_word();
      if (space != ".param" && space != ".reg") tokens_.fail("expected .param");
      FunctionParameter parameter = parse_parameter();
      parameter.offset = static_cast<int>(
          round_up(static_cast<uint64_t>(used), static_cast<uint64_t>(parameter.alignment)));
      used = parameter.offset + parameter.size;
      parameters.push_back(std::move(parameter));
    } while (tokens_.accept(","));
  }
  tokens_.expect(")");
  bytes = used;
}

FunctionParameter ModuleParser::parse_parameter() {
  FunctionParameter parameter{};
  bool of_pointee = false;  // .ptr .global .align 16 speaks of what the pointer points to
  while (tokens_.is_directive()) {
    const std::string_view word = tokens_.next().text;
    if (word == ".align") {
      const auto alignment = static_cast<int>(tokens_.constant());
      if (!of_pointee) parameter.alignment = alignment;
    } else if (word == ".ptr") {
      of_pointee = true;
    } else if (const Type type = parse_type(word.substr(1)); type != Type::kNone) {
      parameter.type = type;
    }
  }
  if (tokens_.is_word()) parameter.name = tokens_.next().text;
  bool open = false;
  const uint64_t count = parse_extents(open);
  parameter.size = static_cast<int>(count) * size_of(parameter.type);
  if (!parameter.alignment) parameter.alignment = std::max(size_of(parameter.type), 1);
  return parameter;
}

}  // namespace mergeme::ptx
