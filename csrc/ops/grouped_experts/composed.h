// The op out of grouped products and torch's elementwise ops: for what a backend has no kernel of
// its own for.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>

#include <cmath>
#include <numbers>
#include <tuple>

#include "csrc/ops/grouped_experts/checks.h"

namespace mergeme::grouped_experts {

#define MERGEME_STRING_OF(x) #x
#define MERGEME_STRING(x) MERGEME_STRING_OF(x)

inline at::Tensor grouped_matmul(const char* layout, const at::Tensor& a, const at::Tensor& b,
                                 const at::Tensor& expert_offsets) {
  const auto name = std::string(MERGEME_STRING(MERGEME_NAMESPACE) "::grouped_matmul_") + layout;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name.c_str(), "")
      .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>()
      .call(a, b, expert_offsets);
}

// The activation of the gate and its derivative.
inline std::pair<at::Tensor, at::Tensor> activate(const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) {
    const at::Tensor sigmoid = gate.sigmoid();
    return {gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))};
  }
  if (activation == Activation::kGelu) {
    const at::Tensor cdf = 0.5 * (1 + (gate * std::numbers::sqrt2 / 2).erf());
    const at::Tensor density =
        (gate * gate * -0.5).exp() * (0.5 * std::numbers::inv_sqrtpi * std::numbers::sqrt2);
    return {gate * cdf, cdf + gate * density};
  }
  const double slope = std::numbers::sqrt2 * std::numbers::inv_sqrtpi;
  const at::Tensor square = gate * gate;
  const at::Tensor tanh = (slope * gate * (1 + 0.044715 * square)).tanh();
  return {0.5 * gate * (1 + tanh),
          0.5 * (1 + tanh) + 0.5 * slope * gate * (1 - tanh * tanh) * (1 + 3 * 0.044715 * square)};
}

inline at::Tensor tokens_of(const at::Tensor& permutation, int64_t top_k) {
  return at::div(permutation, std::max<int64_t>(top_k, 1), "floor").to(at::kLong);
}

// Rows of no expert, at and after expert_offsets[E], give zero.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> composed_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_weights, const at::Tensor& offsets, const at::Tensor& permutation,
    const at::Tensor& inverse, const at::Tensor& preactivation, Activation kind,
    std::array<bool, 4> output_mask) {
  const auto dtype = x.scalar_type(), acc = topk_weights.scalar_type();
  const int64_t top_k = topk_weights.size(1);
  const at::Tensor token = tokens_of(permutation, top_k), back = inverse.to(at::kLong);
  const at::Tensor rows = x.index_select(0, token), grad_rows = grad.index_select(0, token);
  const at::Tensor weights =
      topk_weights.reshape({-1}).index_select(0, permutation.to(at::kLong)).unsqueeze(1);
  const auto halves = preactivation.to(acc).chunk(2, -1);
  const auto [activated, slope] = activate(halves[0], kind);
  const at::Tensor activation = activated * halves[1];
  // The gradient of the activation before weighting: its product with the activation, summed, is
  // <grad, expert output>, the gradient of the weight, without the expert outputs.
  const at::Tensor unweighted = grouped_matmul("nn", grad_rows, down, offsets).to(acc);
  const auto empty = [&](const at::Tensor& like) { return at::empty({0}, like.options()); };
  at::Tensor grad_x = empty(x), grad_gate_up = empty(gate_up), grad_down = empty(down);
  at::Tensor grad_weights = empty(topk_weights);
  if (output_mask[3])
    grad_weights =
        (unweighted * activation).sum(-1).index_select(0, back).view(topk_weights.sizes());
  if (output_mask[2])
    grad_down = grouped_matmul("tn", grad_rows, (weights * activation).to(dtype), offsets);
  if (output_mask[0] || output_mask[1]) {
    const at::Tensor grad_activation = weights * unweighted;
    const at::Tensor grad_pair =
        at::cat({grad_activation * halves[1] * slope, grad_activation * activated}, -1).to(dtype);
    if (output_mask[1]) grad_gate_up = grouped_matmul("tn", grad_pair, rows, offsets);
    if (output_mask[0])
      grad_x = grouped_matmul("nn", grad_pair, gate_up, offsets)
                   .index_select(0, back)
                   .view({x.size(0), top_k, x.size(1)})
                   .sum(at::IntArrayRef{1}, false, acc)
                   .to(dtype);
  }
  return {grad_x, grad_gate_up, grad_down, grad_weights};
}

}  // namespace mergeme::grouped_experts
