#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme::grouped_matmul {

// out[row, :] for the task's rows, counted from its first, and panels; ldo elements between rows.
MERGEME_DECLARE_LOOPS(void multiply(const PanelTask& task, void* out, int64_t ldo, void* scratch);)

}  // namespace mergeme::grouped_matmul
