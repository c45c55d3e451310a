// The parser's state: where it is in the text, and the names that are in scope there.
#pragma once
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "csrc/ptx/machine.h"
#include "csrc/ptx/tokens.h"

namespace mergeme::ptx {

class ModuleParser {
 public:
  ModuleParser(std::string_view source, ParsedModule& module) : tokens_(source), module_(module) {}
  // parser.cpp
  void parse_module();

 private:
  // One .reg declaration: a register, or numbered ones from zero (.reg .b32 %r<8>).
  struct Registers {
    int first;
    int count;
    Type type;
  };
  struct Scope {
    std::unordered_map<std::string, Registers> registers;
    std::unordered_map<std::string, Registers> numbered_registers;
    std::unordered_map<std::string, Symbol*> symbols;
    int number = 0;
  };

  // parser.cpp
  bool skip_module_directive();
  void parse_function(bool is_entry);
  void parse_function_directives();
  void parse_body();
  void lay_out_parameters();
  void parse_statement();
  void parse_label();
  void parse_location();

  // parser_declarations.cpp
  void parse_module_variables(bool is_extern);
  void parse_function_variables();
  void parse_registers();
  void parse_parameters(std::vector<FunctionParameter>& parameters, int& bytes);
  FunctionParameter parse_parameter();
  std::vector<std::unique_ptr<Symbol>> parse_variables(Space space, bool is_extern);
  Symbol parse_variable_attributes(int& vector_size);
  void parse_declarator(Symbol& variable, int element_bytes);
  void parse_initializer(Symbol& variable, uint64_t& index);
  void parse_address_initializer(Symbol& variable, uint64_t index);
  uint64_t parse_extents(bool& open);

  // parser_instructions.cpp
  void parse_instruction();
  void parse_call(ParsedInstruction& instruction);
  void parse_operand_list(std::vector<ParsedOperand>& operands);
  ParsedOperand parse_operand();
  ParsedOperand parse_address();
  ParsedOperand parse_negative();
  ParsedOperand parse_name(std::string_view name);
  bool find_register(const std::string& name, ParsedOperand& operand) const;
  Symbol* find_symbol(const std::string& name) const;

  TokenCursor tokens_;
  ParsedModule& module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  int source_file_ = 0;
  int source_line_ = 0;
};

}  // namespace mergeme::ptx
