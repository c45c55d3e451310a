// Bits of registers as numbers, and back.
#pragma once
#include <bit>
#include <cstdint>
#include <type_traits>

#include "csrc/ptx/parser.h"

namespace mergeme::ptx {

// The rounding modifiers; those ending in i round to an integer in the same format.
enum class Rounding : uint8_t { kRn, kRz, kRm, kRp, kRna, kRni, kRzi, kRmi, kRpi };

// What NVIDIA's units return for a NaN, whatever went in.
inline constexpr uint32_t kNanF32 = 0x7fffffff;
inline constexpr uint64_t kNanF64 = 0x7ff8000000000000;
// A NaN in every format of 16 or 32 bits: fills whatever a kernel may not read yet.
inline constexpr uint32_t kPoison = 0x7fc07fc0;

inline uint64_t low_bytes(uint64_t value, int bytes) {
  if (bytes >= 8) return value;
  if (bytes == 4) return static_cast<uint32_t>(value);
  if (bytes == 2) return static_cast<uint16_t>(value);
  return static_cast<uint8_t>(value);
}

// A register's low bits as a T.
template <typename T>
inline T from_register(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<uint32_t>(bits));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(bits);
  else
    return static_cast<T>(bits);
}

// A T as a register holds it: zero above its own bits.
template <typename T>
inline uint64_t to_register(T value) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<uint32_t>(value);
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<uint64_t>(value);
  else
    return static_cast<std::make_unsigned_t<T>>(value);
}

inline float half_to_float(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}
inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounds to one element of a floating type and returns its bits. What overflows becomes the largest
// finite value if asked for, and always where the format has no infinity (.e4m3).
uint64_t encode_float(double value, Type type, Rounding rounding, bool saturate_to_finite);
// The value of one element of a floating type, exact.
double decode_float(uint64_t bits, Type type);

}  // namespace mergeme::ptx
