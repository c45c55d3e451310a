// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/quantize_fp8/params.h"

namespace mergeme::quantize_fp8 {

// Rows of x in blocks. What is written is e4m3, or the same numbers in bfloat16, which holds them
// exactly and in which the CPU multiplies them.
struct Task {
  void* q;       // [S, K]
  float* scale;  // [S, blocks]
  const void* x;
  int64_t columns;  // K
  DType dtype;      // of x
  bool widened;     // q is bfloat16
};

// Rows [begin, end); and numbers that are e4m3 already, in bfloat16.
MERGEME_DECLARE_LOOPS(void quantize_rows(const Task& task, int64_t begin, int64_t end);
                      void widen(const float8_e4m3_t* from, bfloat16_t* to, int64_t count);)

// With the instruction set in use.
inline void quantize(const Task& task, int64_t begin, int64_t end) {
  MERGEME_CALL_LOOPS(quantize_rows, task, begin, end);
}
inline void widen_numbers(const float8_e4m3_t* from, bfloat16_t* to, int64_t count) {
  MERGEME_CALL_LOOPS(widen, from, to, count);
}

// Rows and numbers that a thread is worth waking for.
inline constexpr int64_t kGrain = 32768;
inline int64_t grain(int64_t columns) { return ceil_div(kGrain, columns < 1 ? 1 : columns); }

}  // namespace mergeme::quantize_fp8
