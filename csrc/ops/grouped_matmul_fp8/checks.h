#pragma once
#include "csrc/common/float8_blocks.h"
#include "csrc/common/grouped_glue.h"

namespace mergeme::grouped_matmul_fp8 {

inline constexpr const char* kOp = "mergeme::grouped_matmul_fp8";

inline void check_output(const char* op, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat, op,
                   ": expected dtype to be float16, bfloat16 or float32, got ", name_of(dtype));
}

// An operand in e4m3 and the scales beside it, which are of these sizes.
inline void check_scale(const char* op, const char* arg, const at::Tensor& scale,
                        at::IntArrayRef sizes, at::Device device) {
  check_dtype(op, arg, scale, at::kFloat);
  check_sizes(op, arg, scale, sizes);
  check_device(op, arg, scale, device);
}

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                  const at::Tensor& b_scale, const at::Tensor& expert_offsets,
                  at::ScalarType dtype) {
  check_dtype(kOp, "a", a, at::kFloat8_e4m3fn);
  check_dtype(kOp, "b", b, at::kFloat8_e4m3fn);
  check_dtype(kOp, "expert_offsets", expert_offsets, at::kInt);
  check_output(kOp, dtype);
  check_dim(kOp, "a", a, 2, "[M, K]");
  check_dim(kOp, "b", b, 3, "[E, N, K]");
  TORCH_CHECK_VALUE(b.size(0) >= 1 && b.size(2) == a.size(1), kOp, ": expected b of shape [E, N, ",
                    a.size(1), "] with E >= 1, got ", b.sizes());
  const int64_t blocks = scale_blocks(a.size(1));
  check_scale(kOp, "a_scale", a_scale, {a.size(0), blocks}, a.device());
  check_scale(kOp, "b_scale", b_scale, {b.size(0), scale_blocks(b.size(1)), blocks}, a.device());
  check_sizes(kOp, "expert_offsets", expert_offsets, {b.size(0) + 1});
  check_num_rows(kOp, "a", a.size(0));
  check_device(kOp, "b", b, a.device());
  check_device(kOp, "expert_offsets", expert_offsets, a.device());
}

}  // namespace mergeme::grouped_matmul_fp8
