#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme::grouped_matmul {

// out[row, :] for the task's rows, counted from its first, and panels; ldo elements between rows.
// Rounded to the task's dtype, or kept in the accumulation type if `wide`.
MERGEME_DECLARE_MATRIX(void multiply(const PanelTask& task, void* out, int64_t ldo, bool wide,
                                     void* scratch);)

// With the instruction set in use.
inline void multiply(const PanelTask& task, void* out, int64_t ldo, bool wide, void* scratch) {
  MERGEME_CALL_MATRIX(multiply, task, out, ldo, wide, scratch);
}

}  // namespace mergeme::grouped_matmul
