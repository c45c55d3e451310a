// Scalar formulas of the gate, shared by the CPU loops and the kernels. Torch-free.
//
// Every operation is spelled out and rounds in the accumulation type, and sums run in one fixed
// order (32 strided partial sums, then halves onto halves), so all backends agree in every bit.
#pragma once
#include <cstdint>
#include <limits>

#include "csrc/common/numeric.h"
#include "csrc/ops/topk_gating/params.h"

namespace mergeme::topk_gating {

inline constexpr int kLanes = 32;  // partial sums of a row: item i belongs to lane i % 32

// exp(x) for x <= 0, within 2 units in the last place: 2^n * exp(r) with |r| <= log(2) / 2 and a
// Taylor polynomial in r, whose remainder is below a tenth of a unit. NaN stays NaN.
MERGEME_HD float exp_nonpositive(float x) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -104.f ? -104.f : x;          // exp(-104) rounds to 0
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log(2) in two parts
  float y = 1.f / 5040;
  y = y * r + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  // 2^n in two factors: the first product is exact, the second rounds once where it is subnormal.
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kMagic));
  const uint32_t half = static_cast<uint32_t>(exponent >> 1);
  const uint32_t rest = static_cast<uint32_t>(exponent) - half;
  return y * float_of((half + 127u) << 23) * float_of((rest + 127u) << 23);
}

MERGEME_HD double exp_nonpositive(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -746.0 ? -746.0 : x;
  const double shifted = x * 1.4426950408889634074 + kMagic;
  const double n = shifted - kMagic;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double y = 1.0 / 6227020800.0;  // 1 / 13!
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const int64_t exponent = static_cast<int64_t>(bits_of(shifted) - bits_of(kMagic));
  const uint64_t half = static_cast<uint64_t>(exponent >> 1);
  const uint64_t rest = static_cast<uint64_t>(exponent) - half;
  return y * double_of((half + 1023u) << 52) * double_of((rest + 1023u) << 52);
}

template <typename A>
MERGEME_HD A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

// exp(-|z|), the part both halves of the sigmoid share.
template <typename A>
MERGEME_HD A exp_minus_abs(A z) {
  return exp_nonpositive(z > A(0) ? -z : z);
}
template <typename A>
MERGEME_HD A sigmoid(A z) {
  const A t = exp_minus_abs(z);
  return (z < A(0) ? t : A(1)) / (A(1) + t);
}
// 1 - sigmoid(z), without the cancellation.
template <typename A>
MERGEME_HD A sigmoid_complement(A z) {
  const A t = exp_minus_abs(z);
  return (z < A(0) ? A(1) : t) / (A(1) + t);
}

// score(z) = share(z, top) * exp(top), up to a factor common to a row. With top the largest level,
// the largest share is at least 1/2: a sum of shares never underflows, though scores may.
template <typename A>
MERGEME_HD A level(Score score, A z) {
  return score == Score::kSigmoid && z > A(0) ? A(0) : z;
}
template <typename A>
MERGEME_HD A share(Score score, A z, A top) {
  const A e = exp_nonpositive(level(score, z) - top);
  return score == Score::kSigmoid ? e / (A(1) + exp_minus_abs(z)) : e;
}
// With every level at -inf all scores are zero: shares and weights become 0, not NaN.
template <typename A>
MERGEME_HD A finite_top(A top) {
  return top == minus_infinity<A>() ? A(0) : top;
}
template <typename A>
MERGEME_HD A nonzero_sum(A sum) {
  return sum == A(0) ? A(1) : sum;
}

// Integers ordered like the numbers they come from: -0 equals 0, and NaN is the largest, so that a
// token with a NaN selects it.
template <typename A>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <typename A>
using key_t = typename KeyOf<A>::type;

template <typename A>
inline constexpr key_t<A> kNanKey = std::numeric_limits<key_t<A>>::max();
template <typename A>
inline constexpr key_t<A> kTakenKey = std::numeric_limits<key_t<A>>::min();  // below -inf's key

template <typename A>
MERGEME_HD key_t<A> order_key(A x) {
  using Key = key_t<A>;
  const Key bits = static_cast<Key>(bits_of(x + A(0)));  // -0 becomes 0
  const Key key = bits ^ (bits < 0 ? std::numeric_limits<Key>::max() : Key(0));
  return x != x ? kNanKey<A> : key;
}

}  // namespace mergeme::topk_gating
