#pragma once
#include <limits>

#include "csrc/common/torch_glue.h"

namespace mergeme::sort_by_expert {

inline constexpr const char* kOp = "mergeme::sort_by_expert";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& topk_ids, int64_t num_experts, std::optional<int64_t> capacity,
                  const std::optional<at::Tensor>& priority) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  check_dtype(kOp, "topk_ids", topk_ids, at::kInt);
  check_dim(kOp, "topk_ids", topk_ids, 2, "[T, K]");
  TORCH_CHECK_VALUE(topk_ids.numel() <= kLimit, kOp,
                    ": expected topk_ids of fewer than 2^31 slots (positions are int32), got ",
                    topk_ids.numel());
  TORCH_CHECK_VALUE(num_experts >= 1 && num_experts < kLimit, kOp,
                    ": expected num_experts in [1, 2^31 - 2], got ", num_experts);
  TORCH_CHECK_VALUE(!capacity || (*capacity >= 0 && *capacity <= kLimit), kOp,
                    ": expected capacity in [0, 2^31 - 1] or None, got ", capacity.value_or(0));
  if (!priority) return;
  TORCH_CHECK_VALUE(capacity.has_value(), kOp,
                    ": expected priority to be None without a capacity, got a tensor");
  TORCH_CHECK_TYPE(priority->scalar_type() == at::kFloat || priority->scalar_type() == at::kDouble,
                   kOp, ": expected priority to be float32 or float64, got ",
                   name_of(priority->scalar_type()));
  check_sizes(kOp, "priority", *priority, topk_ids.sizes());
  check_device(kOp, "priority", *priority, topk_ids.device());
}

}  // namespace mergeme::sort_by_expert
