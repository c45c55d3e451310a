// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/first_nonfinite/params.h"

namespace mergeme::first_nonfinite {

// The first index in [begin, end) that holds a NaN or an infinity, or kNone.
MERGEME_DECLARE_LOOPS(int64_t find(const void* tensor, DType dtype, int64_t begin, int64_t end);)

}  // namespace mergeme::first_nonfinite
