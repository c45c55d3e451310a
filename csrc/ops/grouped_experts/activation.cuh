// The activations of gate rows and their derivatives, for kernels. Torch-free.
#pragma once
#include <cmath>
#include <numbers>

#include "csrc/common/numeric.h"
#include "csrc/ops/grouped_experts/activation.h"
#include "csrc/simt/device.cuh"

namespace mergeme::grouped_experts {

// f(x), and f'(x) in `slope`.
template <Activation kKind, typename Acc>
__device__ __forceinline__ Acc activate(Acc x, Acc& slope) {
  constexpr Acc one{1}, half{0.5};
  if constexpr (kKind == Activation::kSilu) {
    const Acc sigmoid = one / (one + std::exp(-x));
    slope = sigmoid * (one + x * (one - sigmoid));
    return x / (one + std::exp(-x));
  } else if constexpr (kKind == Activation::kGelu) {
    constexpr Acc root = std::numbers::sqrt2_v<Acc> / 2;
    constexpr Acc density = root * std::numbers::inv_sqrtpi_v<Acc>;  // 1 / sqrt(2 pi)
    const Acc cdf = half * (one + std::erf(x * root));
    slope = cdf + x * (density * std::exp(-half * x * x));
    return x * cdf;
  } else {
    constexpr Acc scale = std::numbers::sqrt2_v<Acc> * std::numbers::inv_sqrtpi_v<Acc>;
    constexpr Acc cubic = Acc(0.044715);
    const Acc square = x * x, tanh = std::tanh(scale * x * (one + cubic * square));
    slope =
        half * (one + tanh) + half * x * (one - tanh * tanh) * (scale * (one + 3 * cubic * square));
    return half * x * (one + tanh);
  }
}

// Calls fn.template operator()<kKind>(): a branch outside the loops over elements.
template <typename F>
__device__ __forceinline__ void dispatch_activation(Activation kind, F&& fn) {
  if (kind == Activation::kSilu)
    fn.template operator()<Activation::kSilu>();
  else if (kind == Activation::kGelu)
    fn.template operator()<Activation::kGelu>();
  else
    fn.template operator()<Activation::kGeluTanh>();
}

}  // namespace mergeme::grouped_experts
