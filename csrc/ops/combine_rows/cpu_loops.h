// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/combine_rows/params.h"

namespace mergeme::combine_rows {

// Combines elements [begin, end) of the chunk. Along columns `by_model` holds the weights as
// [M, row_length] in the accumulation type; otherwise it is not looked at.
MERGEME_DECLARE_LOOPS(void combine_range(const Params& p, const void* by_model, int64_t begin,
                                         int64_t end);)

}  // namespace mergeme::combine_rows
