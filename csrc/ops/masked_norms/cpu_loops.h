// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/masked_norms/params.h"

namespace mergeme::masked_norms {

// Writes p.partials of blocks [begin, end) for all models; p.terms is ready.
MERGEME_DECLARE_LOOPS(void sum_blocks(const Params& p, int64_t begin, int64_t end);)

}  // namespace mergeme::masked_norms
