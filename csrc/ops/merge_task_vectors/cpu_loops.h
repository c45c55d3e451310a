// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/merge_task_vectors/params.h"

namespace mergeme::merge_task_vectors {

// Merges elements [begin, end); p.terms and *p.total are ready.
MERGEME_DECLARE_LOOPS(void merge_range(const Params& p, int64_t begin, int64_t end);)

}  // namespace mergeme::merge_task_vectors
