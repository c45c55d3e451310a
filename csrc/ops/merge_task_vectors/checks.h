#pragma once
#include <limits>

#include "csrc/common/torch_models.h"
#include "csrc/ops/merge_task_vectors/params.h"

namespace mergeme::merge_task_vectors {

inline constexpr const char* kOp = "mergeme::merge_task_vectors";

inline Elect elect_of(std::string_view name) {
  if (name == "none") return Elect::kNone;
  if (name == "sum") return Elect::kSum;
  if (name == "count") return Elect::kCount;
  if (name == "unweighted") return Elect::kUnweighted;
  TORCH_CHECK_VALUE(false, kOp, ": expected elect to be none, sum, count or unweighted, got ",
                    name);
}

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& base, at::TensorList tensors, const at::Tensor& weights,
                  const at::Tensor& scales, const at::Tensor& selection, Mask mask,
                  int64_t offset) {
  check_models(kOp, "base", base, tensors);
  const auto num_models = int64_t(tensors.size());
  for (const auto& [name, t] : {std::pair{"weights", &weights}, std::pair{"scales", &scales}}) {
    check_dtype(kOp, name, *t, at::kDouble);
    check_sizes(kOp, name, *t, {num_models});
    check_device(kOp, name, *t, base.device());
  }
  check_selection(kOp, selection, num_models, selection_width(mask), base.device());
  TORCH_CHECK_VALUE(offset >= 0 && offset <= std::numeric_limits<int64_t>::max() - base.numel(),
                    kOp, ": expected offset in [0, 2^63 - numel), got ", offset);
}

}  // namespace mergeme::merge_task_vectors
