#include "csrc/ptx/instructions/reduction.h"

#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

constexpr std::string_view kReductions[] = {"add", "min",  "max", "inc", "dec",
                                            "cas", "exch", "and", "or",  "xor"};

template <typename T>
T reduce_floats(Reduction reduction, T old, T operand) {
  switch (reduction) {
    case Reduction::kMin:
      return min_or_max<false>(old, operand, {});
    case Reduction::kMax:
      return min_or_max<true>(old, operand, {});
    default:
      return old + operand;
  }
}

// The sum of two elements of a half type is exact in double.
uint64_t reduce_half(Reduction reduction, Type type, uint64_t old, uint64_t operand) {
  const double result = reduce_floats(reduction, decode_float(old & 0xffff, type),
                                      decode_float(operand & 0xffff, type));
  return encode_float(result, type, Rounding::kRn, false);
}

template <typename T>
uint64_t reduce_integers(Reduction reduction, uint64_t old_bits, uint64_t operand_bits) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto old = from_register<T>(old_bits);
  const auto operand = from_register<T>(operand_bits);
  switch (reduction) {
    case Reduction::kMin:
      return to_register(std::min(old, operand));
    case Reduction::kMax:
      return to_register(std::max(old, operand));
    default:
      return static_cast<Unsigned>(static_cast<Unsigned>(old) + static_cast<Unsigned>(operand));
  }
}

uint64_t reduce_numbers(Reduction reduction, Type type, uint64_t old, uint64_t operand) {
  switch (type) {
    case Type::kF32:
      return canonical(
          reduce_floats(reduction, from_register<float>(old), from_register<float>(operand)));
    case Type::kF64:
      return to_register(
          reduce_floats(reduction, from_register<double>(old), from_register<double>(operand)));
    case Type::kF16:
    case Type::kBF16:
      return reduce_half(reduction, type, old, operand);
    case Type::kF16x2:
    case Type::kBF16x2: {
      const Type half = type == Type::kF16x2 ? Type::kF16 : Type::kBF16;
      return reduce_half(reduction, half, old, operand) |
             reduce_half(reduction, half, old >> 16, operand >> 16) << 16;
    }
    case Type::kS32:
      return reduce_integers<int32_t>(reduction, old, operand);
    case Type::kS64:
      return reduce_integers<int64_t>(reduction, old, operand);
    case Type::kU64:
    case Type::kB64:
      return reduce_integers<uint64_t>(reduction, old, operand);
    default:
      return reduce_integers<uint32_t>(reduction, old, operand);
  }
}

}  // namespace

bool decode_reduction(const ParsedInstruction& parsed, Reduction& reduction) {
  const int found = modifier_among(parsed, kReductions);
  if (found < 0) return false;
  reduction = static_cast<Reduction>(found);
  return true;
}

uint64_t reduce(Reduction reduction, Type type, uint64_t old, uint64_t operand, uint64_t other) {
  const int bytes = size_of(type);
  old = low_bytes(old, bytes);
  operand = low_bytes(operand, bytes);
  switch (reduction) {
    case Reduction::kAdd:
    case Reduction::kMin:
    case Reduction::kMax:
      return reduce_numbers(reduction, type, old, operand);
    case Reduction::kInc:
      return old >= operand ? 0 : old + 1;
    case Reduction::kDec:
      return old == 0 || old > operand ? operand : old - 1;
    case Reduction::kCas:
      return old == operand ? low_bytes(other, bytes) : old;
    case Reduction::kExch:
      return operand;
    case Reduction::kAnd:
      return old & operand;
    case Reduction::kOr:
      return old | operand;
    case Reduction::kXor:
      return old ^ operand;
  }
  return old;
}

void reduce_in_place(Reduction reduction, Type type, uint8_t* to, const uint8_t* operand) {
  uint64_t old_bits = 0;
  uint64_t operand_bits = 0;
  const auto bytes = static_cast<size_t>(size_of(type));
  std::memcpy(&old_bits, to, bytes);
  std::memcpy(&operand_bits, operand, bytes);
  const uint64_t result = reduce(reduction, type, old_bits, operand_bits, 0);
  std::memcpy(to, &result, bytes);
}

}  // namespace mergeme::ptx
