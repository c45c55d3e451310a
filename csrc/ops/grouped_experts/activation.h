// The functions between gate and up, by name. Torch-free.
#pragma once
#include <cstdint>

namespace mergeme::grouped_experts {

// silu(g) = g / (1 + e^-g); gelu(g) = g (1 + erf(g / sqrt 2)) / 2; gelu_tanh is its approximation
// g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2.
enum class Activation : int32_t { kSilu, kGelu, kGeluTanh };

}  // namespace mergeme::grouped_experts
