// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/weighted_sum/params.h"

namespace mergeme::weighted_sum {

// Sums elements [begin, end).
MERGEME_DECLARE_LOOPS(void sum_range(const Params& p, int64_t begin, int64_t end);)

}  // namespace mergeme::weighted_sum
