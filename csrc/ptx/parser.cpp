// Modules, functions and statements. Declarations and instructions have files of their own.
#include "csrc/ptx/parser.h"

#include "csrc/ptx/module_parser.h"

namespace mergeme::ptx {
namespace {

constexpr int kParamAlignment = 16;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

std::string label_key(const std::string& label, int scope) {
  return label + "@" + std::to_string(scope);
}

}  // namespace

int ParsedFunction::find_label(const std::string& label, int scope) const {
  for (; scope >= 0; scope = parent_scopes[static_cast<size_t>(scope)])
    if (const auto found = labels.find(label_key(label, scope)); found != labels.end())
      return found->second;
  return -1;
}

void ModuleParser::parse_module() {
  while (!tokens_.at_end()) {
    if (skip_module_directive()) continue;
    bool is_extern = false;
    while (tokens_.is(".extern") || tokens_.is(".visible") || tokens_.is(".weak") ||
           tokens_.is(".common")) {
      is_extern |= tokens_.is(".extern");
      tokens_.next();
    }
    if (tokens_.accept(".entry"))
      parse_function(true);
    else if (tokens_.accept(".func"))
      parse_function(false);
    else if (tokens_.is(".global") || tokens_.is(".const") || tokens_.is(".shared") ||
             tokens_.is(".local") || tokens_.is(".param"))
      parse_module_variables(is_extern);
    else
      tokens_.fail("unknown module-level directive");
  }
}

bool ModuleParser::skip_module_directive() {
  if (tokens_.accept(";")) return true;
  if (tokens_.accept(".version") || tokens_.accept(".address_size")) {
    tokens_.next();
    return true;
  }
  if (tokens_.accept(".target")) {
    do tokens_.expect_word();
    while (tokens_.accept(","));
    return true;
  }
  if (tokens_.accept(".file")) {
    const auto number = static_cast<int>(tokens_.constant_term());
    module_.files[number] = tokens_.next().text;
    while (tokens_.accept(",")) tokens_.next();  // time stamp and size
    return true;
  }
  if (tokens_.is(".loc")) {
    parse_location();
    return true;
  }
  if (tokens_.accept(".section")) {  // debug information
    tokens_.skip_past("{");
    for (int depth = 1; depth > 0; tokens_.next()) {
      if (tokens_.at_end()) tokens_.fail("unexpected end");
      if (tokens_.is("{")) depth++;
      if (tokens_.is("}")) depth--;
    }
    return true;
  }
  if (tokens_.is(".pragma") || tokens_.is(".alias")) {
    tokens_.skip_past(";");
    return true;
  }
  return false;
}

void ModuleParser::parse_function(bool is_entry) {
  auto function = std::make_unique<Function>();
  function_ = function.get();
  function_->is_entry = is_entry;
  while (tokens_.is(".noreturn") || tokens_.is(".attribute"))
    if (tokens_.next().text == ".attribute") tokens_.skip_past(")");
  if (!is_entry && tokens_.is("(")) parse_parameters(function_->results, function_->result_bytes);
  function_->name = tokens_.expect_word();
  if (tokens_.is("(")) parse_parameters(function_->parameters, function_->parameter_bytes);
  parse_function_directives();
  if (tokens_.is("{"))
    parse_body();
  else
    tokens_.accept(";");
  std::unique_ptr<Function>& slot = module_.functions[function_->name];
  if (!slot || function_->has_body) slot = std::move(function);
  function_ = nullptr;
  scopes_.clear();
}

void ModuleParser::parse_function_directives() {
  while (tokens_.is_directive()) {
    const std::string_view name = tokens_.next().text;
    if (name == ".pragma") {
      tokens_.skip_past(";");
      continue;
    }
    std::array<int, 3> values{1, 1, 1};
    size_t found = 0;
    while (tokens_.peek().kind == TokenKind::kNumber || tokens_.is(",")) {
      if (tokens_.accept(",")) continue;
      values[std::min<size_t>(found++, 2)] = static_cast<int>(tokens_.constant());
    }
    if (name == ".reqntid") function_->required_threads = values;
    if (name == ".maxntid") function_->max_threads = values;
  }
}

// A function's .param space holds its parameters, its results, then the variables of its calls.
void ModuleParser::lay_out_parameters() {
  Function& function = *function_;
  if (!function.is_entry) {
    const int results = round_up(function.parameter_bytes, kParamAlignment);
    for (FunctionParameter& result : function.results) result.offset += results;
    function.param_bytes =
        static_cast<uint64_t>(results + round_up(function.result_bytes, kParamAlignment));
  }
  for (const auto* list : {&function.parameters, &function.results})
    for (const FunctionParameter& parameter : *list) {
      auto symbol = std::make_unique<Symbol>();
      symbol->name = parameter.name;
      symbol->space = Space::kParam;
      symbol->address = static_cast<uint64_t>(parameter.offset);
      symbol->size = static_cast<uint64_t>(parameter.size);
      symbol->alignment = parameter.alignment;
      symbol->placed = true;
      symbol->is_extern = true;  // tells parameters from variables of calls
      scopes_.front().symbols[parameter.name] = symbol.get();
      function.variables.push_back(std::move(symbol));
    }
}

void ModuleParser::parse_body() {
  tokens_.expect("{");
  scopes_.assign(1, {});
  function_->parent_scopes = {-1};
  lay_out_parameters();
  while (!scopes_.empty()) {
    if (tokens_.at_end()) tokens_.fail("unexpected end");
    if (tokens_.accept("{")) {
      const int parent = scopes_.back().number;
      scopes_.emplace_back().number = static_cast<int>(function_->parent_scopes.size());
      function_->parent_scopes.push_back(parent);
    } else if (tokens_.accept("}")) {
      scopes_.pop_back();
    } else if (!tokens_.accept(";")) {
      parse_statement();
    }
  }
  function_->has_body = true;
}

void ModuleParser::parse_statement() {
  if (tokens_.is_word() && tokens_.peek(1).kind == TokenKind::kPunctuation &&
      tokens_.peek(1).text == ":")
    parse_label();
  else if (tokens_.accept(".reg"))
    parse_registers();
  else if (tokens_.is(".loc"))
    parse_location();
  else if (tokens_.is(".pragma"))
    tokens_.skip_past(";");
  else if (tokens_.is(".local") || tokens_.is(".shared") || tokens_.is(".param") ||
           tokens_.is(".const") || tokens_.is(".global") || tokens_.is(".extern"))
    parse_function_variables();
  else if (tokens_.is_directive())
    tokens_.fail("unknown directive in function body");
  else
    parse_instruction();
}

void ModuleParser::parse_label() {
  const std::string label(tokens_.expect_word());
  tokens_.expect(":");
  if (tokens_.accept(".branchtargets")) {
    std::vector<std::string>& targets = function_->branch_targets[label];
    do targets.emplace_back(tokens_.expect_word());
    while (tokens_.accept(","));
    tokens_.expect(";");
  } else if (tokens_.is(".callprototype") || tokens_.is(".calltargets")) {
    tokens_.skip_past(";");
  } else {
    function_->labels[label_key(label, scopes_.back().number)] =
        static_cast<int>(function_->parsed.size());
  }
}

// .loc file line column [, function_name label [+ offset]] [, inlined_at file line column]
void ModuleParser::parse_location() {
  tokens_.expect(".loc");
  source_file_ = static_cast<int>(tokens_.constant_term());
  source_line_ = static_cast<int>(tokens_.constant_term());
  tokens_.constant_term();
  while (tokens_.accept(",")) {
    if (tokens_.expect_word() == "function_name") {
      tokens_.expect_word();
      tokens_.offset();
    } else {
      for (int k = 0; k < 3; k++) tokens_.constant_term();
    }
  }
}

void parse(const std::string& text, ParsedModule& module) {
  ModuleParser(text, module).parse_module();
}

}  // namespace mergeme::ptx
