#include "csrc/ptx/numbers.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mergeme::ptx {
namespace {

struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool infinities;
};

Format format_of(Type type) {
  switch (type) {
    case Type::kF16:
    case Type::kF16x2:
      return {5, 10, true};
    case Type::kBF16:
    case Type::kBF16x2:
      return {8, 7, true};
    case Type::kTF32:
      return {8, 10, true};
    case Type::kF32:
      return {8, 23, true};
    case Type::kE4M3:
    case Type::kE4M3x2:
      return {4, 3, false};
    case Type::kE5M2:
    case Type::kE5M2x2:
      return {5, 2, true};
    default:
      return {11, 52, true};
  }
}

// Whether a magnitude of `whole` steps and a `rest` of one is rounded away from zero.
bool rounds_away(double whole, double rest, bool negative, Rounding rounding) {
  switch (rounding) {
    case Rounding::kRz:
    case Rounding::kRzi:
      return false;
    case Rounding::kRm:
      return negative && rest > 0;
    case Rounding::kRp:
      return !negative && rest > 0;
    case Rounding::kRna:
      return rest >= 0.5;
    default:
      return rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2.0) == 1.0);
  }
}

uint64_t encode_magnitude(double magnitude, bool negative, Format format, Rounding rounding,
                          bool saturate) {
  const uint64_t infinity = format.infinities ? ((uint64_t{1} << format.exponent_bits) - 1)
                                                    << format.mantissa_bits
                                              : 0x7f;
  const uint64_t largest = infinity - 1;
  if (magnitude == 0) return 0;
  if (std::isinf(magnitude)) return saturate || !format.infinities ? largest : infinity;

  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // of a fraction in [0.5, 1)
  exponent = std::max(exponent - 1, 1 - bias);
  const double steps = std::ldexp(magnitude, format.mantissa_bits - exponent);
  const double whole = std::floor(steps);
  const bool away = rounds_away(whole, steps - whole, negative, rounding);
  // The implicit bit of a normal number carries into the exponent, and so does rounding.
  const uint64_t bits = (static_cast<uint64_t>(exponent - (1 - bias)) << format.mantissa_bits) +
                        static_cast<uint64_t>(whole) + (away ? 1 : 0);
  if (bits < infinity) return bits;
  const bool towards_zero = rounding == Rounding::kRz || (rounding == Rounding::kRm && !negative) ||
                            (rounding == Rounding::kRp && negative);
  return saturate || !format.infinities || towards_zero ? largest : infinity;
}

// An element of eight bits whose exponent and mantissa have the given widths; 0 and up.
double decode_small(uint32_t magnitude, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(magnitude >> mantissa_bits);
  const int mantissa = static_cast<int>(magnitude & ((1u << mantissa_bits) - 1));
  if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

}  // namespace

uint64_t encode_float(double value, Type type, Rounding rounding, bool saturate_to_finite) {
  if (type == Type::kF64) return std::bit_cast<uint64_t>(value);
  if (type == Type::kTF32 && value != value) return kNanF32;
  const Format format = format_of(type);
  const int sign_bit = format.exponent_bits + format.mantissa_bits;
  const int shift = type == Type::kTF32 ? 13 : 0;  // it lies in the upper bits of a register
  if (value != value) return (uint64_t{1} << sign_bit) - 1;
  const bool negative = std::signbit(value);
  const uint64_t sign = uint64_t{negative} << sign_bit;
  const uint64_t magnitude =
      encode_magnitude(std::fabs(value), negative, format, rounding, saturate_to_finite);
  return (sign | magnitude) << shift;
}

double decode_float(uint64_t bits, Type type) {
  switch (type) {
    case Type::kF16:
      return half_to_float(static_cast<uint16_t>(bits));
    case Type::kBF16:
      return bfloat16_to_float(static_cast<uint16_t>(bits));
    case Type::kF32:
    case Type::kTF32:
      return from_register<float>(bits);
    case Type::kF64:
      return from_register<double>(bits);
    case Type::kE4M3: {
      const uint32_t magnitude = bits & 0x7f;
      const double sign = bits & 0x80 ? -1 : 1;
      if (magnitude == 0x7f) return std::numeric_limits<double>::quiet_NaN();
      return sign * decode_small(magnitude, 3, 7);
    }
    case Type::kE5M2: {
      const uint32_t magnitude = bits & 0x7f;
      const double sign = bits & 0x80 ? -1 : 1;
      if (magnitude > 0x7c) return std::numeric_limits<double>::quiet_NaN();
      if (magnitude == 0x7c) return sign * std::numeric_limits<double>::infinity();
      return sign * decode_small(magnitude, 2, 15);
    }
    default:
      return 0;
  }
}

}  // namespace mergeme::ptx
