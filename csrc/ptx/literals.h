// The names and numbers of PTX: types, special registers, literals.
#pragma once
#include <optional>
#include <string_view>

#include "csrc/ptx/parser.h"

namespace mergeme::ptx {

// The register of a name with its percent sign; those without a meaning here read as zero.
std::optional<SpecialRegister> parse_special_register(std::string_view name);
// A number as an immediate operand.
ParsedOperand parse_literal(std::string_view text);
// The suffix of a type: "bf16".
std::string_view name_of(Type type);

}  // namespace mergeme::ptx
