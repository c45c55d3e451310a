#pragma once
#include "csrc/common/torch_glue.h"

namespace mergeme::first_nonfinite {

inline constexpr const char* kOp = "mergeme::first_nonfinite";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& tensor) { check_floating(kOp, "tensor", tensor); }

}  // namespace mergeme::first_nonfinite
