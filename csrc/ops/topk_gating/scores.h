// Scalar formulas of the gate, shared by the CPU loops and the kernels. Torch-free.
//
// Every operation is spelled out and rounds in the accumulation type, and sums run in one fixed
// order (32 strided partial sums, then halves onto halves), so all backends agree in every bit.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/common/numeric.h"
#include "csrc/common/order_key.h"
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

// log(1 + t) / t for t in [0, 1], within 3 units in the last place: with u = t / (2 + t) it is
// 2 / (2 + t) * (1 + u^2 / 3 + u^4 / 5 + ...), and u^2 <= 1/9.
MERGEME_HD float log1p_ratio(float t) {
  const float q = 1.f / (2.f + t), u = t * q, w = u * u;
  float y = 1.f / 15;
  y = y * w + 1.f / 13;
  y = y * w + 1.f / 11;
  y = y * w + 1.f / 9;
  y = y * w + 1.f / 7;
  y = y * w + 1.f / 5;
  y = y * w + 1.f / 3;
  y = y * w + 1.f;
  return 2.f * q * y;
}
MERGEME_HD double log1p_ratio(double t) {
  const double q = 1.0 / (2.0 + t), u = t * q, w = u * u;
  double y = 1.0 / 33;
  y = y * w + 1.0 / 31;
  y = y * w + 1.0 / 29;
  y = y * w + 1.0 / 27;
  y = y * w + 1.0 / 25;
  y = y * w + 1.0 / 23;
  y = y * w + 1.0 / 21;
  y = y * w + 1.0 / 19;
  y = y * w + 1.0 / 17;
  y = y * w + 1.0 / 15;
  y = y * w + 1.0 / 13;
  y = y * w + 1.0 / 11;
  y = y * w + 1.0 / 9;
  y = y * w + 1.0 / 7;
  y = y * w + 1.0 / 5;
  y = y * w + 1.0 / 3;
  y = y * w + 1.0;
  return 2.0 * q * y;
}

#if defined(__CUDA_ARCH__)
MERGEME_HD float square_root(float x) { return __fsqrt_rn(x); }
MERGEME_HD double square_root(double x) { return __dsqrt_rn(x); }
#else
MERGEME_HD float square_root(float x) { return __builtin_sqrtf(x); }
MERGEME_HD double square_root(double x) { return __builtin_sqrt(x); }
#endif

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
// softplus(z) / exp(min(z, 0)), where t = exp(-|z|): at least log(2), and never below the tiniest
// exponential.
template <typename A>
MERGEME_HD A softplus_ratio(A z, A t) {
  const A ratio = log1p_ratio(t);
  return z < A(0) ? ratio : z + t * ratio;
}

// score(z) = share(z, top) * exp(top), up to a factor common to a row. With top the largest level,
// the largest share is at least 1/2: a sum of shares never underflows, though scores may. Scores
// "none" are the logits: their share is the logit, and top the largest magnitude.
template <Score S, typename A>
MERGEME_HD A level(A z) {
  if constexpr (S == Score::kNone) return z < A(0) ? -z : z;
  if constexpr (S == Score::kSigmoid) return z > A(0) ? A(0) : z;
  if constexpr (S == Score::kSqrtSoftplus) return z > A(0) ? A(0) : z * A(0.5);
  return z;
}
template <Score S, typename A>
MERGEME_HD A share(A z, A top) {
  if constexpr (S == Score::kNone) return z;
  const A e = exp_nonpositive(level<S>(z) - top);
  if constexpr (S == Score::kSigmoid) return e / (A(1) + exp_minus_abs(z));
  if constexpr (S == Score::kSqrtSoftplus)
    return e * square_root(softplus_ratio(z, exp_minus_abs(z)));
  return e;
}
// The score by itself; a softmax has none.
template <Score S, typename A>
MERGEME_HD A lone_score(A z) {
  return S == Score::kSigmoid ? sigmoid(z) : share<S>(z, A(0));
}
// d log(score) / dz; for a softmax the part that the normalisation adds is left to the caller.
template <Score S, typename A>
MERGEME_HD A log_slope(A z) {
  if constexpr (S == Score::kSigmoid) return sigmoid_complement(z);
  if constexpr (S == Score::kSqrtSoftplus) {  // sigmoid(z) / (2 softplus(z))
    const A t = exp_minus_abs(z);
    return A(0.5) / ((A(1) + t) * softplus_ratio(z, t));
  }
  return A(1);
}
// An item that adds nothing to a sum of shares.
template <Score S, typename A>
MERGEME_HD A neutral() {
  return S == Score::kNone ? A(0) : minus_infinity<A>();
}
// With every level at -inf all scores are zero: shares and weights become 0, not NaN.
template <typename A>
MERGEME_HD A finite_top(A top) {
  return top == minus_infinity<A>() ? A(0) : top;
}
template <Score S, typename A>
MERGEME_HD A usable_sum(A top, A sum) {
  if constexpr (S == Score::kNone) return top == A(0) ? -minus_infinity<A>() : sum;
  return sum == A(0) ? A(1) : sum;
}

// The key of a group whose two best experts have the keys `first` and `second`: of the sum of their
// scores, biased if `biased`. Otherwise the keys are the logits', and a softmax's shares are
// compared undivided, so that a NaN elsewhere in the row cannot draw the choice away from itself.
template <Score S, typename A>
MERGEME_HD key_t<A> top2_key(std::type_identity_t<key_t<A>> first,
                             std::type_identity_t<key_t<A>> second, bool biased, A top) {
  const A x = number_of<A>(first), y = number_of<A>(second);
  if (biased) return order_key(x + y);
  if constexpr (S == Score::kSoftmax) return order_key(share<S>(x, top) + share<S>(y, top));
  return order_key(lone_score<S>(x) + lone_score<S>(y));
}
// Whether a softmax over all experts is needed, not only over the selected.
MERGEME_HD bool needs_all(const Params& p) {
  return p.bias != nullptr || !p.renormalize ||
         (p.num_groups > 1 && p.group_score == GroupScore::kTop2);
}

// Calls fn.template operator()<S>() for the score named at run time. For host code.
template <typename F>
inline void dispatch_score(Score score, F&& fn) {
  switch (score) {
    case Score::kSoftmax:
      return fn.template operator()<Score::kSoftmax>();
    case Score::kSigmoid:
      return fn.template operator()<Score::kSigmoid>();
    case Score::kSqrtSoftplus:
      return fn.template operator()<Score::kSqrtSoftplus>();
    case Score::kNone:
      return fn.template operator()<Score::kNone>();
  }
}

}  // namespace mergeme::topk_gating
