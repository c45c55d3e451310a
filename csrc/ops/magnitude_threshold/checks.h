#pragma once
#include "csrc/common/torch_models.h"

namespace mergeme::magnitude_threshold {

inline constexpr const char* kOp = "mergeme::magnitude_threshold";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& base, at::TensorList tensors, at::IntArrayRef keep) {
  check_models(kOp, "base", base, tensors);
  TORCH_CHECK_VALUE(keep.size() == tensors.size(), kOp, ": expected keep to hold ", tensors.size(),
                    " counts, one for each tensor, got ", keep.size());
  for (size_t m = 0; m < keep.size(); ++m)
    TORCH_CHECK_VALUE(keep[m] >= 0 && keep[m] <= base.numel(), kOp, ": expected keep[", m,
                      "] in [0, ", base.numel(), "], got ", keep[m]);
}

}  // namespace mergeme::magnitude_threshold
