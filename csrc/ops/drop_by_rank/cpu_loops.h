// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/drop_by_rank/params.h"

namespace mergeme::drop_by_rank {

// Bytes of scratch that drop_rows needs for each element of a row: two lists of items and the rank.
inline constexpr int64_t kScratchPerElement = 2 * 16 + 4;

// Writes row t % rows of model t / rows for t in [begin, end); `scratch` is aligned to 16 bytes.
MERGEME_DECLARE_LOOPS(void drop_rows(const Params& p, int64_t begin, int64_t end, void* scratch);)

}  // namespace mergeme::drop_by_rank
