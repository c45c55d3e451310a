#pragma once
#include <array>
#include <string_view>

#include "csrc/common/grouped_glue.h"
#include "csrc/ops/grouped_experts/activation.h"

namespace mergeme::grouped_experts {

inline constexpr const char* kOp = "mergeme::grouped_experts";
inline constexpr const char* kBackwardOp = "mergeme::grouped_experts_backward";

inline Activation activation_of(const char* op, std::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(name == "gelu_tanh", op,
                    ": expected activation to be silu, gelu or gelu_tanh, got ", name);
  return Activation::kGeluTanh;
}

// The routing of a token batch to so many experts.
inline void check_routing(const char* op, const at::Tensor& x, const at::Tensor& topk_weights,
                          const at::Tensor& expert_offsets, const at::Tensor& permutation,
                          const at::Tensor& inverse, int64_t num_experts) {
  check_dtype(op, "topk_weights", topk_weights,
              x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  check_dtype(op, "expert_offsets", expert_offsets, at::kInt);
  check_dtype(op, "permutation", permutation, at::kInt);
  check_dtype(op, "inverse", inverse, at::kInt);
  check_dim(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_sizes(op, "topk_weights", topk_weights, {x.size(0), topk_weights.size(1)});
  check_sizes(op, "expert_offsets", expert_offsets, {num_experts + 1});
  check_num_rows(op, "topk_weights", topk_weights.numel());
  check_sizes(op, "permutation", permutation, {topk_weights.numel()});
  check_sizes(op, "inverse", inverse, {topk_weights.numel()});
  check_device(op, "topk_weights", topk_weights, x.device());
  check_device(op, "expert_offsets", expert_offsets, x.device());
  check_device(op, "permutation", permutation, x.device());
  check_device(op, "inverse", inverse, x.device());
}

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const char* op, const at::Tensor& x, const at::Tensor& gate_up,
                  const at::Tensor& down, const at::Tensor& topk_weights,
                  const at::Tensor& expert_offsets, const at::Tensor& permutation,
                  const at::Tensor& inverse) {
  check_floating(op, "x", x);
  check_dtype(op, "gate_up", gate_up, x.scalar_type());
  check_dtype(op, "down", down, x.scalar_type());
  check_dim(op, "x", x, 2, "[T, H]");
  check_dim(op, "gate_up", gate_up, 3, "[E, 2I, H]");
  check_dim(op, "down", down, 3, "[E, H, I]");
  const int64_t num_experts = gate_up.size(0), hidden = x.size(1);
  TORCH_CHECK_VALUE(num_experts >= 1 && gate_up.size(1) % 2 == 0 && gate_up.size(2) == hidden, op,
                    ": expected gate_up of shape [E, 2I, ", hidden, "] with E >= 1, got ",
                    gate_up.sizes());
  check_sizes(op, "down", down, {num_experts, hidden, gate_up.size(1) / 2});
  check_device(op, "gate_up", gate_up, x.device());
  check_device(op, "down", down, x.device());
  check_routing(op, x, topk_weights, expert_offsets, permutation, inverse, num_experts);
}

// What the backward takes besides.
inline void check_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up,
                           const at::Tensor& topk_weights, const at::Tensor& preactivation) {
  check_dtype(kBackwardOp, "grad", grad, x.scalar_type());
  check_sizes(kBackwardOp, "grad", grad, x.sizes());
  check_device(kBackwardOp, "grad", grad, x.device());
  check_dtype(kBackwardOp, "preactivation", preactivation, x.scalar_type());
  check_sizes(kBackwardOp, "preactivation", preactivation, {topk_weights.numel(), gate_up.size(1)});
  check_device(kBackwardOp, "preactivation", preactivation, x.device());
}

}  // namespace mergeme::grouped_experts
