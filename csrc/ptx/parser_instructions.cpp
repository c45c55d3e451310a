// Instructions and their operands.
#include <charconv>

#include "csrc/ptx/literals.h"
#include "csrc/ptx/module_parser.h"

namespace mergeme::ptx {
namespace {

constexpr size_t kMaxTextInMessages = 400;

bool is_name_or_register(OperandKind kind) {
  return kind == OperandKind::kSymbol || kind == OperandKind::kName ||
         kind == OperandKind::kRegister || kind == OperandKind::kSpecialRegister;
}

// "ld.global.f32" as its opcode and its modifiers.
void split_mnemonic(ParsedInstruction& instruction) {
  std::string_view rest = instruction.mnemonic;
  const auto next = [&] {
    const size_t dot = rest.find('.');
    const std::string_view part = rest.substr(0, dot);
    rest = dot == std::string_view::npos ? std::string_view() : rest.substr(dot + 1);
    return std::string(part);
  };
  instruction.opcode = next();
  while (!rest.empty()) instruction.modifiers.push_back(next());
}

std::string for_messages(std::string_view source) {
  std::string text(source.substr(0, kMaxTextInMessages));
  if (source.size() > kMaxTextInMessages) text += "...";
  for (char& c : text)
    if (c == '\t' || c == '\n') c = ' ';
  return text;
}

}  // namespace

void ModuleParser::parse_instruction() {
  ParsedInstruction instruction;
  instruction.line = tokens_.peek().line;
  instruction.source_file = source_file_;
  instruction.source_line = source_line_;
  instruction.scope = scopes_.back().number;
  const size_t begin = tokens_.peek().begin;
  if (tokens_.accept("@")) {
    instruction.has_guard = true;
    instruction.guard_negated = tokens_.accept("!");
    const ParsedOperand guard = parse_name(tokens_.expect_word());
    if (guard.kind != OperandKind::kPredicate) tokens_.fail("the guard is not a predicate");
    instruction.guard = guard.index;
  }
  instruction.mnemonic = tokens_.expect_word();
  split_mnemonic(instruction);
  if (instruction.opcode == "call") {
    parse_call(instruction);
  } else if (!tokens_.is(";")) {
    do {
      instruction.operands.push_back(parse_operand());
      if (tokens_.accept("|")) {
        instruction.has_second_output = true;
        instruction.second_output = parse_operand();
      }
    } while (tokens_.accept(","));
  }
  tokens_.expect(";");
  instruction.text = for_messages(tokens_.source(begin, tokens_.last_end()));
  function_->parsed.push_back(std::move(instruction));
}

// call [(results),] function [, (arguments)] [, prototype]
void ModuleParser::parse_call(ParsedInstruction& instruction) {
  if (tokens_.is("(")) {
    parse_operand_list(instruction.call_results);
    tokens_.expect(",");
  }
  instruction.operands.push_back(parse_operand());
  while (tokens_.accept(",")) {
    if (tokens_.is("("))
      parse_operand_list(instruction.call_arguments);
    else
      tokens_.expect_word();  // the prototype says nothing that the call does not
  }
}

void ModuleParser::parse_operand_list(std::vector<ParsedOperand>& operands) {
  tokens_.expect("(");
  if (!tokens_.is(")")) {
    do operands.push_back(parse_operand());
    while (tokens_.accept(","));
  }
  tokens_.expect(")");
}

ParsedOperand ModuleParser::parse_operand() {
  if (tokens_.accept("!")) {
    ParsedOperand operand = parse_operand();
    operand.negated = !operand.negated;
    return operand;
  }
  if (tokens_.accept("{")) {
    ParsedOperand vector;
    vector.kind = OperandKind::kVector;
    if (!tokens_.is("}")) {
      do vector.elements.push_back(parse_operand());
      while (tokens_.accept(","));
    }
    tokens_.expect("}");
    return vector;
  }
  if (tokens_.accept("[")) return parse_address();
  if (tokens_.accept("-")) return parse_negative();
  if (tokens_.accept("(")) {
    ParsedOperand operand = parse_operand();
    operand.integer += static_cast<uint64_t>(tokens_.offset());
    tokens_.expect(")");
    return operand;
  }
  if (tokens_.peek().kind == TokenKind::kNumber) return parse_literal(tokens_.next().text);
  const std::string_view word = tokens_.expect_word();
  if (word == "generic" && tokens_.accept("(")) {
    ParsedOperand operand = parse_name(tokens_.expect_word());
    tokens_.expect(")");
    return operand;
  }
  ParsedOperand operand = parse_name(word);
  if (operand.kind == OperandKind::kSymbol || operand.kind == OperandKind::kName)
    operand.offset += tokens_.offset();
  return operand;
}

// [base], [base + offset], [base, {coordinates}]: the bracket is already behind.
ParsedOperand ModuleParser::parse_address() {
  ParsedOperand address;
  address.kind = OperandKind::kAddress;
  ParsedOperand base = parse_operand();
  if (is_name_or_register(base.kind)) std::swap(address.offset, base.offset);
  address.offset += tokens_.offset();
  address.elements.push_back(std::move(base));
  while (tokens_.accept(",")) address.elements.push_back(parse_operand());
  tokens_.expect("]");
  return address;
}

ParsedOperand ModuleParser::parse_negative() {
  ParsedOperand operand = parse_operand();
  if (operand.kind != OperandKind::kImmediate) tokens_.fail("unexpected '-'");
  operand.real = -operand.real;
  if (operand.is_float && operand.float_bits)
    operand.integer ^= uint64_t{1} << (operand.float_bits - 1);
  else
    operand.integer = -operand.integer;
  return operand;
}

ParsedOperand ModuleParser::parse_name(std::string_view name) {
  ParsedOperand operand;
  operand.name = name;
  if (name == "_") {
    operand.kind = OperandKind::kSink;
    return operand;
  }
  if (find_register(operand.name, operand)) return operand;
  if (name == "WARP_SZ") {
    operand.kind = OperandKind::kImmediate;
    operand.integer = kWarpSize;
    return operand;
  }
  if (const auto special = parse_special_register(name)) {
    operand.kind = OperandKind::kSpecialRegister;
    operand.index = static_cast<int>(*special);
    return operand;
  }
  operand.symbol = find_symbol(operand.name);
  operand.kind = operand.symbol ? OperandKind::kSymbol : OperandKind::kName;
  return operand;
}

bool ModuleParser::find_register(const std::string& name, ParsedOperand& operand) const {
  const auto take = [&](const Registers& registers, int number) {
    const int rows = registers.type == Type::kB128 ? 2 : 1;
    operand.kind = registers.type == Type::kPred ? OperandKind::kPredicate : OperandKind::kRegister;
    operand.index = registers.first + number * rows;
    return true;
  };
  const size_t digits = name.find_last_not_of("0123456789") + 1;
  int number = -1;
  std::from_chars(name.data() + digits, name.data() + name.size(), number);
  const std::string stem = name.substr(0, digits);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto found = scope->registers.find(name); found != scope->registers.end())
      return take(found->second, 0);
    if (number < 0) continue;
    const auto found = scope->numbered_registers.find(stem);
    if (found != scope->numbered_registers.end() && number < found->second.count)
      return take(found->second, number);
  }
  return false;
}

Symbol* ModuleParser::find_symbol(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
    if (const auto found = scope->symbols.find(name); found != scope->symbols.end())
      return found->second;
  const auto found = module_.symbols.find(name);
  return found == module_.symbols.end() ? nullptr : found->second.get();
}

}  // namespace mergeme::ptx
