// The activations and their derivatives on vectors. Included by files that are compiled once per
// instruction set.
#pragma once
#include <cmath>
#include <numbers>
#include <type_traits>

#include "csrc/common/cpu_vector.h"
#include "csrc/ops/grouped_experts/activation.h"

namespace mergeme::grouped_experts {
namespace {

template <typename V>
MERGEME_INLINE V sigmoid(V x) {
  return 1 / (V{} + 1 + exp(-x));
}

// The sigmoid s of x and its slope s (1 - s). Both from e^-|x|: 1 - s, where s is close to 1, would
// keep few correct digits, and the slopes of the activations multiply it by as much as the gate's
// cube.
template <typename V>
MERGEME_INLINE V sigmoid(V x, V& slope) {
  const V e = exp(V(x < 0 ? x : -x));
  const V larger = 1 / (1 + e);
  slope = e * larger * larger;
  return x < 0 ? e * larger : larger;
}

template <typename V>
MERGEME_INLINE V error_function(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::erf(x[i]);
  return x;
}

// f(gate), and f'(gate) if asked for.
template <Activation kKind, bool kSlope, typename V>
MERGEME_INLINE V activate(V gate, V& slope) {
  using Acc = std::remove_cvref_t<decltype(gate[0])>;
  if constexpr (kKind == Activation::kSilu) {
    if constexpr (!kSlope) return gate / (V{} + 1 + exp(-gate));
    V rise;
    const V s = sigmoid(gate, rise);
    slope = s + gate * rise;
    return gate * s;
  } else if constexpr (kKind == Activation::kGelu) {
    constexpr Acc kRoot = Acc(std::numbers::sqrt2 / 2);
    constexpr Acc kDensity = Acc(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
    const V cdf = Acc(0.5) * (1 + error_function(V(gate * kRoot)));
    if constexpr (kSlope) slope = cdf + gate * (kDensity * exp(Acc(-0.5) * gate * gate));
    return gate * cdf;
  } else {
    // (1 + tanh(y)) / 2 is the sigmoid of 2y.
    constexpr Acc kTwice = Acc(2 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi);
    constexpr Acc kCubic = Acc(0.044715);
    const V square = gate * gate;
    const V inner = kTwice * gate * (1 + kCubic * square);
    if constexpr (!kSlope) return gate * sigmoid(inner);
    V rise;
    const V half = sigmoid(inner, rise);
    slope = half + gate * rise * kTwice * (1 + 3 * kCubic * square);
    return gate * half;
  }
}

// Calls fn.template operator()<kKind>().
template <typename F>
MERGEME_INLINE void dispatch_activation(Activation kind, F fn) {
  switch (kind) {
    case Activation::kSilu:
      return fn.template operator()<Activation::kSilu>();
    case Activation::kGelu:
      return fn.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return fn.template operator()<Activation::kGeluTanh>();
  }
}

}  // namespace
}  // namespace mergeme::grouped_experts
