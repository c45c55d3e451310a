#pragma once
#include "csrc/common/torch_models.h"

namespace mergeme::weighted_sum {

inline constexpr const char* kOp = "mergeme::weighted_sum";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(at::TensorList tensors, const at::Tensor& weights) {
  check_models(kOp, "tensors[0]", tensors.empty() ? weights : tensors[0], tensors);
  check_dtype(kOp, "weights", weights, at::kDouble);
  check_sizes(kOp, "weights", weights, {int64_t(tensors.size())});
  check_device(kOp, "weights", weights, tensors[0].device());
}

}  // namespace mergeme::weighted_sum
