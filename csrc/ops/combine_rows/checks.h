#pragma once
#include <optional>

#include "csrc/common/torch_models.h"
#include "csrc/ops/combine_rows/params.h"

namespace mergeme::combine_rows {

inline constexpr const char* kOp = "mergeme::combine_rows";

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline Axis check(const std::optional<at::Tensor>& base, at::TensorList tensors,
                  const at::Tensor& weights, std::string_view axis, int64_t offset,
                  int64_t row_length) {
  const bool with_base = base.has_value();
  const char* name = with_base ? "base" : "tensors[0]";
  const at::Tensor& first = with_base ? *base : tensors.empty() ? weights : tensors[0];
  check_models(kOp, name, first, tensors);
  check_dim(kOp, name, first, 1, "[n]");
  check_dtype(kOp, "weights", weights, at::kDouble);
  const auto num_models = int64_t(tensors.size());
  TORCH_CHECK_VALUE(weights.dim() == 2 && weights.size(1) == num_models, kOp,
                    ": expected weights of shape [G, ", num_models, "], got ", weights.sizes());
  check_device(kOp, "weights", weights, first.device());
  TORCH_CHECK_VALUE(offset >= 0, kOp, ": expected offset of at least 0, got ", offset);
  TORCH_CHECK_VALUE(row_length >= 1, kOp, ": expected row_length of at least 1, got ", row_length);
  const int64_t groups = weights.size(0), end = offset + first.numel();
  if (axis == "all") {
    TORCH_CHECK_VALUE(groups == 1, kOp, ": expected weights of shape [1, M] for all, got ",
                      weights.sizes());
    return Axis::kAll;
  }
  if (axis == "row") {
    TORCH_CHECK_VALUE(groups >= ceil_div(end, row_length), kOp,
                      ": expected weights of shape [G, M] with G at least the ",
                      ceil_div(end, row_length), " rows up to the chunk's end, got ",
                      weights.sizes());
    return Axis::kRow;
  }
  TORCH_CHECK_VALUE(axis == "column", kOp, ": expected axis to be all, row or column, got ", axis);
  TORCH_CHECK_VALUE(groups == row_length, kOp,
                    ": expected weights of shape [G, M] with G = row_length = ", row_length,
                    " for column, got ", weights.sizes());
  return Axis::kColumn;
}

}  // namespace mergeme::combine_rows
