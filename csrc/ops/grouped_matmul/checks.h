#pragma once
#include "csrc/common/grouped_glue.h"
#include "csrc/ops/grouped_matmul/params.h"

namespace mergeme::grouped_matmul {

inline const char* op_name(Layout layout) {
  return layout == Layout::kNt   ? "mergeme::grouped_matmul_nt"
         : layout == Layout::kNn ? "mergeme::grouped_matmul_nn"
                                 : "mergeme::grouped_matmul_tn";
}

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(Layout layout, const at::Tensor& a, const at::Tensor& b,
                  const at::Tensor& expert_offsets) {
  const char* op = op_name(layout);
  check_floating(op, "a", a);
  check_dtype(op, "b", b, a.scalar_type());
  check_dtype(op, "expert_offsets", expert_offsets, at::kInt);
  check_dim(op, "expert_offsets", expert_offsets, 1, "[E + 1]");
  TORCH_CHECK_VALUE(expert_offsets.numel() >= 2, op,
                    ": expected expert_offsets of shape [E + 1] with E >= 1, got ",
                    expert_offsets.sizes());
  const int64_t num_experts = expert_offsets.numel() - 1;
  if (layout == Layout::kTn) {
    check_dim(op, "a", a, 2, "[M, N1]");
    check_dim(op, "b", b, 2, "[M, N2]");
    check_sizes(op, "b", b, {a.size(0), b.size(1)});
  } else {
    const bool nt = layout == Layout::kNt;
    check_dim(op, "a", a, 2, "[M, K]");
    check_dim(op, "b", b, 3, nt ? "[E, N, K]" : "[E, K, N]");
    if (nt)
      check_sizes(op, "b", b, {num_experts, b.size(1), a.size(1)});
    else
      check_sizes(op, "b", b, {num_experts, a.size(1), b.size(2)});
  }
  check_num_rows(op, "a", a.size(0));
  check_device(op, "b", b, a.device());
  check_device(op, "expert_offsets", expert_offsets, a.device());
}

// Sizes of the result, for inputs that passed check().
inline std::vector<int64_t> output_sizes(Layout layout, const at::Tensor& a, const at::Tensor& b,
                                         const at::Tensor& expert_offsets) {
  if (layout == Layout::kTn) return {expert_offsets.numel() - 1, a.size(1), b.size(1)};
  return {a.size(0), b.size(layout == Layout::kNt ? 1 : 2)};
}

}  // namespace mergeme::grouped_matmul
