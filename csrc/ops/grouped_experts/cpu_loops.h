#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/numeric.h"

namespace mergeme::grouped_experts {

// out[t, :] = sum over k, in order, of weights[t, k] * rows[inverse[t * top_k + k], :]; rows at and
// after num_rows count as zero. Null weights are ones.
struct CombineTask {
  void* out;
  const void* rows;  // in the accumulation type
  const void* weights;
  const int32_t* inverse;
  int64_t num_rows;
  int64_t top_k;
  int64_t hidden;
  DType dtype;
};

MERGEME_DECLARE_LOOPS(void combine(const CombineTask& task, int64_t begin, int64_t end);)

}  // namespace mergeme::grouped_experts
