// Handlers made of a function on one lane's values, for one type or for whichever is asked for.
#pragma once
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {

// The handler that make<T>() returns for the C++ type of an integer type; null for other types.
template <typename Make>
Handler for_integer(Type type, Make make) {
  switch (type) {
    case Type::kU8:
    case Type::kB8:
      return make.template operator()<uint8_t>();
    case Type::kS8:
      return make.template operator()<int8_t>();
    case Type::kU16:
    case Type::kB16:
      return make.template operator()<uint16_t>();
    case Type::kS16:
      return make.template operator()<int16_t>();
    case Type::kU32:
    case Type::kB32:
      return make.template operator()<uint32_t>();
    case Type::kS32:
      return make.template operator()<int32_t>();
    case Type::kU64:
    case Type::kB64:
      return make.template operator()<uint64_t>();
    case Type::kS64:
      return make.template operator()<int64_t>();
    default:
      return nullptr;
  }
}

// d = Function::apply(a), of T.
template <typename T, typename Function>
void unary(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = to_register<T>(Function::template apply<T>(from_register<T>(a[lane])));
  });
}

// d = Function::apply(a, b), of T.
template <typename T, typename Function>
void binary(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = to_register<T>(
        Function::template apply<T>(from_register<T>(a[lane]), from_register<T>(b[lane])));
  });
}

// d = Function::apply(a, b, c), of T.
template <typename T, typename Function>
void ternary(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = to_register<T>(Function::template apply<T>(
        from_register<T>(a[lane]), from_register<T>(b[lane]), from_register<T>(c[lane])));
  });
}

// Handlers of a function that has one meaning for every integer type.
template <typename Function>
Handler unary_for(Type type) {
  return for_integer(type, []<typename T>() -> Handler { return unary<T, Function>; });
}
template <typename Function>
Handler binary_for(Type type) {
  return for_integer(type, []<typename T>() -> Handler { return binary<T, Function>; });
}
template <typename Function>
Handler ternary_for(Type type) {
  return for_integer(type, []<typename T>() -> Handler { return ternary<T, Function>; });
}

// The lanes of `mask` in which a predicate operand, or a register that serves as one, is true.
inline uint32_t true_lanes(const Warp& warp, const Operand& operand, uint32_t mask) {
  uint32_t lanes = 0;
  if (operand.kind == OperandKind::kPredicate) {
    lanes = warp.predicates[operand.index];
  } else {
    const uint64_t* values = row(warp, operand);
    for_each_lane(mask, [&](int lane) {
      if (values[lane]) lanes |= 1u << lane;
    });
  }
  return (operand.negated ? ~lanes : lanes) & mask;
}

// Stores lanes into an output that may be `_`.
inline void set_predicate(Warp& warp, const Operand& operand, uint32_t mask, uint32_t values) {
  if (operand.kind == OperandKind::kPredicate) set_predicate(warp, operand.index, mask, values);
}

// The state space that a mnemonic names; generic if none.
inline Space space_of(const ParsedInstruction& parsed) {
  for (const std::string& modifier : parsed.modifiers) {
    if (modifier == "global") return Space::kGlobal;
    if (modifier.starts_with("shared")) return Space::kShared;
    if (modifier == "local") return Space::kLocal;
    if (modifier == "const") return Space::kConst;
    if (modifier.starts_with("param")) return Space::kParam;
  }
  return Space::kGeneric;
}

// The place among `names` of the one that the mnemonic has, or -1.
template <size_t kCount>
int modifier_among(const ParsedInstruction& parsed, const std::string_view (&names)[kCount]) {
  for (size_t i = 0; i < kCount; i++)
    if (parsed.has(names[i])) return static_cast<int>(i);
  return -1;
}

}  // namespace mergeme::ptx
