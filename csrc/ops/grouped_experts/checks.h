#pragma once
#include "csrc/common/grouped_glue.h"

namespace mergeme::grouped_experts {

inline constexpr const char* kOp = "mergeme::grouped_experts";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                  const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                  const at::Tensor& permutation, const at::Tensor& inverse) {
  check_floating(kOp, "x", x);
  check_dtype(kOp, "gate_up", gate_up, x.scalar_type());
  check_dtype(kOp, "down", down, x.scalar_type());
  check_dtype(kOp, "topk_weights", topk_weights,
              x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  check_dtype(kOp, "expert_offsets", expert_offsets, at::kInt);
  check_dtype(kOp, "permutation", permutation, at::kInt);
  check_dtype(kOp, "inverse", inverse, at::kInt);

  check_dim(kOp, "x", x, 2, "[T, H]");
  check_dim(kOp, "gate_up", gate_up, 3, "[E, 2I, H]");
  check_dim(kOp, "down", down, 3, "[E, H, I]");
  check_dim(kOp, "topk_weights", topk_weights, 2, "[T, K]");
  const int64_t num_experts = gate_up.size(0), hidden = x.size(1);
  TORCH_CHECK_VALUE(num_experts >= 1 && gate_up.size(1) % 2 == 0 && gate_up.size(2) == hidden, kOp,
                    ": expected gate_up of shape [E, 2I, ", hidden, "] with E >= 1, got ",
                    gate_up.sizes());
  check_sizes(kOp, "down", down, {num_experts, hidden, gate_up.size(1) / 2});
  check_sizes(kOp, "topk_weights", topk_weights, {x.size(0), topk_weights.size(1)});
  check_sizes(kOp, "expert_offsets", expert_offsets, {num_experts + 1});
  check_num_rows(kOp, "topk_weights", topk_weights.numel());
  check_sizes(kOp, "permutation", permutation, {topk_weights.numel()});
  check_sizes(kOp, "inverse", inverse, {topk_weights.numel()});

  check_device(kOp, "gate_up", gate_up, x.device());
  check_device(kOp, "down", down, x.device());
  check_device(kOp, "topk_weights", topk_weights, x.device());
  check_device(kOp, "expert_offsets", expert_offsets, x.device());
  check_device(kOp, "permutation", permutation, x.device());
  check_device(kOp, "inverse", inverse, x.device());
}

}  // namespace mergeme::grouped_experts
