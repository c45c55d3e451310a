#pragma once
#include <optional>

#include "csrc/common/torch_models.h"
#include "csrc/ops/gram/params.h"

namespace mergeme::gram {

inline constexpr const char* kOp = "mergeme::gram";

// What the vectors of a tensor are: `groups` of them, of `length` elements each.
struct Vectors {
  Axis axis;
  int64_t groups;
  int64_t length;
};

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline Vectors check(const std::optional<at::Tensor>& base, at::TensorList tensors,
                     std::string_view axis) {
  const bool with_base = base.has_value();  // else there are tensors: nothing else has a device
  const at::Tensor& first = with_base ? *base : tensors[0];
  check_models(kOp, with_base ? "base" : "tensors[0]", first, tensors);
  if (axis == "all") return {Axis::kRow, 1, first.numel()};
  const at::IntArrayRef sizes = first.sizes();
  if (axis == "row") {
    if (sizes.empty()) return {Axis::kRow, 1, 1};
    return {Axis::kRow, c10::multiply_integers(sizes.slice(0, sizes.size() - 1)), sizes.back()};
  }
  TORCH_CHECK_VALUE(axis == "column", kOp, ": expected axis to be all, row or column, got ", axis);
  if (sizes.empty()) return {Axis::kColumn, 1, 1};
  return {Axis::kColumn, c10::multiply_integers(sizes.slice(1)), sizes.front()};
}

}  // namespace mergeme::gram
