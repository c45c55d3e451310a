// The CPU's inner loops. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/router_statistics/params.h"

namespace mergeme::router_statistics {

// Room for a row's logits and shares, padded to whole blocks of kLanes, in doubles.
inline int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }
inline int64_t row_room(int64_t num_experts) { return 2 * padded(num_experts); }

// The partials of chunks [begin, end), and the gradient of tokens [begin, end). `room` is
// row_room(E) doubles.
MERGEME_DECLARE_LOOPS(void sum_chunks(const Params& p, int64_t begin, int64_t end, double* room);
                      void backward(const BackwardParams& p, int64_t begin, int64_t end,
                                    double* room);)

}  // namespace mergeme::router_statistics
