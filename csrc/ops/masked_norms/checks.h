#pragma once
#include "csrc/common/torch_models.h"

namespace mergeme::masked_norms {

inline constexpr const char* kOp = "mergeme::masked_norms";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& base, at::TensorList tensors, const at::Tensor& selection,
                  Mask mask) {
  check_models(kOp, "base", base, tensors);
  check_selection(kOp, selection, int64_t(tensors.size()), selection_width(mask), base.device());
}

}  // namespace mergeme::masked_norms
