#pragma once
#include "csrc/common/torch_glue.h"
#include "csrc/ops/quantize_fp8/params.h"

namespace mergeme::quantize_fp8 {

inline constexpr const char* kOp = "mergeme::quantize_fp8";

// Numbers that e4m3 with float32 scales is for.
inline void check_quantizable(const char* op, const char* arg, const at::Tensor& t) {
  const auto s = t.scalar_type();
  TORCH_CHECK_TYPE(s == at::kHalf || s == at::kBFloat16 || s == at::kFloat, op, ": expected ", arg,
                   " to be float16, bfloat16 or float32, got ", name_of(s));
}

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& x) {
  check_quantizable(kOp, "x", x);
  check_dim(kOp, "x", x, 2, "[S, K]");
}

}  // namespace mergeme::quantize_fp8
