// Scalar formulas of the gate, shared by the CPU loops and the kernels. Torch-free.
//
// Every operation is spelled out and rounds in the accumulation type, and sums run in one fixed
// order (32 strided partial sums, then halves onto halves), so all backends agree in every bit.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/common/elementary.h"
#include "csrc/common/numeric.h"
#include "csrc/common/order_key.h"
#include "csrc/ops/topk_gating/params.h"

namespace mergeme::topk_gating {

inline constexpr int kLanes = 32;  // partial sums of a row: item i belongs to lane i % 32

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
// The score as the choice compares it, bias added: where it underflows, it may do so early.
template <Score S, typename A>
MERGEME_HD A choice_score(A z) {
  if constexpr (S == Score::kSqrtSoftplus) {
    const A t = exp_minus_abs(z), part = t * log1p_ratio(t);
    return square_root(z < A(0) ? part : z + part);
  }
  return lone_score<S>(z);
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
