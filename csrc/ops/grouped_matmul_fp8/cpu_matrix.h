#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme::grouped_matmul_fp8 {

// out[row, :] for the task's rows, counted from its first, and panels; `columns` elements between
// rows, of type `dtype`.
MERGEME_DECLARE_MATRIX(void multiply(const ScaledTask& task, void* out, DType dtype,
                                     void* scratch);)

// With the instruction set in use.
inline void multiply(const ScaledTask& task, void* out, DType dtype, void* scratch) {
  MERGEME_CALL_MATRIX(multiply, task, out, dtype, scratch);
}

}  // namespace mergeme::grouped_matmul_fp8
