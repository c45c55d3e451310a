// What the instructions on floating-point numbers share.
#pragma once
#include <immintrin.h>

#include <cmath>

#include "csrc/ptx/numbers.h"

namespace mergeme::ptx {

// .ftz: a denormal becomes a zero of its sign.
inline float flush_denormal(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits & 0x7f800000 ? x : std::bit_cast<float>(bits & 0x80000000);
}

// .sat: into [0, 1], a NaN to 0.
template <typename T>
T saturate(T x) {
  if (!(x > 0)) return 0;
  return x > 1 ? T{1} : x;
}

// Results that are not a number have one bit pattern.
inline uint64_t canonical(float x) { return x != x ? kNanF32 : std::bit_cast<uint32_t>(x); }
inline uint64_t canonical(double x) { return x != x ? kNanF64 : std::bit_cast<uint64_t>(x); }

inline uint16_t float_to_half(float x) {
  if (x != x) return 0x7fff;
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// x + y rounded to odd: what rounds it again, to fewer bits, rounds the exact sum.
inline double sum_to_odd(double x, double y) {
  const double sum = x + y;
  if (!std::isfinite(sum)) return sum;
  const double rounded_y = sum - x;
  const double error = (x - (sum - rounded_y)) + (y - rounded_y);
  const uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (error == 0 || (bits & 1)) return sum;
  const bool away_from_zero = (error > 0) == (sum > 0);
  return std::bit_cast<double>(away_from_zero ? bits + 1 : bits - 1);
}

// min and max of two numbers: a NaN gives way to a number unless .NaN is given, -0 is less than +0.
// With .xorsign.abs magnitudes are compared, and the sign is the product's.
struct MinMaxRules {
  bool nan = false;
  bool xorsign = false;
  bool abs = false;
};
template <bool kMax, typename T>
T min_or_max(T x, T y, const MinMaxRules& rules) {
  if (rules.xorsign || rules.abs) {
    const T sign = std::signbit(x) != std::signbit(y) ? T{-1} : T{1};
    x = std::fabs(x);
    y = std::fabs(y);
    T result = kMax ? std::max(x, y) : std::min(x, y);
    if (x != x)
      result = rules.nan ? x : y;
    else if (y != y)
      result = rules.nan ? y : x;
    return rules.xorsign ? std::copysign(result, sign) : result;
  }
  if (x != x || y != y) {
    if (rules.nan) return std::numeric_limits<T>::quiet_NaN();
    return x != x ? y : x;
  }
  if (x == y) return std::signbit(x) == kMax ? y : x;
  return (x > y) == kMax ? x : y;
}

// Sets the rounding of the processor's own arithmetic while it lives; it is to nearest otherwise.
class RoundingScope {
 public:
  explicit RoundingScope(Rounding rounding) : changed_(rounding != Rounding::kRn) {
    if (!changed_) return;
    unsigned mode = _MM_ROUND_NEAREST;
    if (rounding == Rounding::kRz) mode = _MM_ROUND_TOWARD_ZERO;
    if (rounding == Rounding::kRm) mode = _MM_ROUND_DOWN;
    if (rounding == Rounding::kRp) mode = _MM_ROUND_UP;
    _MM_SET_ROUNDING_MODE(mode);
  }
  ~RoundingScope() {
    if (changed_) _MM_SET_ROUNDING_MODE(_MM_ROUND_NEAREST);
  }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  bool changed_;
};

}  // namespace mergeme::ptx
