#pragma once
#include <limits>

#include "csrc/common/torch_models.h"

namespace mergeme::drop_by_rank {

inline constexpr const char* kOp = "mergeme::drop_by_rank";

// The length of a row, which is the last dimension.
inline int64_t row_length(const at::Tensor& base) { return base.dim() == 0 ? 1 : base.size(-1); }

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& base, at::TensorList tensors, const at::Tensor& selection,
                  int64_t offset) {
  check_models(kOp, "base", base, tensors);
  check_selection(kOp, selection, int64_t(tensors.size()), 2, base.device());
  TORCH_CHECK_VALUE(row_length(base) < (int64_t{1} << 32), kOp,
                    ": expected rows of base to be shorter than 2^32, got ", row_length(base));
  TORCH_CHECK_VALUE(offset >= 0 && offset <= std::numeric_limits<int64_t>::max() - base.numel(),
                    kOp, ": expected offset in [0, 2^63 - numel), got ", offset);
}

// [M, *base] in the accumulation type.
inline at::Tensor empty_output(const at::Tensor& base, at::TensorList tensors) {
  std::vector<int64_t> sizes = base.sizes().vec();
  sizes.insert(sizes.begin(), int64_t(tensors.size()));
  return at::empty(
      sizes, base.options().dtype(base.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

}  // namespace mergeme::drop_by_rank
