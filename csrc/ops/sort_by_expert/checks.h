#pragma once
#include <limits>

#include "csrc/common/torch_glue.h"

namespace mergeme::sort_by_expert {

inline constexpr const char* kOp = "mergeme::sort_by_expert";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& topk_ids, int64_t num_experts) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  check_dtype(kOp, "topk_ids", topk_ids, at::kInt);
  check_dim(kOp, "topk_ids", topk_ids, 2, "[T, K]");
  TORCH_CHECK_VALUE(topk_ids.numel() <= kLimit, kOp,
                    ": expected topk_ids of fewer than 2^31 slots (positions are int32), got ",
                    topk_ids.numel());
  TORCH_CHECK_VALUE(num_experts >= 1 && num_experts < kLimit, kOp,
                    ": expected num_experts in [1, 2^31 - 2], got ", num_experts);
}

}  // namespace mergeme::sort_by_expert
