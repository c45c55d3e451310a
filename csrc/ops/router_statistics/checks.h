#pragma once
#include <limits>

#include "csrc/common/torch_glue.h"
#include "csrc/ops/router_statistics/params.h"

namespace mergeme::router_statistics {

inline constexpr const char* kOp = "mergeme::router_statistics";
inline constexpr const char* kBackwardOp = "mergeme::router_statistics_backward";

inline at::ScalarType sum_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_rows(const char* op, const at::Tensor& logits,
                       const std::optional<at::Tensor>& mask) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[T, E]");
  TORCH_CHECK_VALUE(logits.size(1) >= 1 && logits.size(1) < kLimit, op,
                    ": expected E in [1, 2^31 - 2], got ", logits.size(1));
  if (!mask) return;
  check_dtype(op, "mask", *mask, at::kBool);
  check_sizes(op, "mask", *mask, {logits.size(0)});
  check_device(op, "mask", *mask, logits.device());
}

// Each runs first in every backend. Neither reads an element, so neither synchronises a stream.
inline void check(const at::Tensor& logits, const at::Tensor& topk_ids,
                  const std::optional<at::Tensor>& mask) {
  check_rows(kOp, logits, mask);
  check_dtype(kOp, "topk_ids", topk_ids, at::kInt);
  check_dim(kOp, "topk_ids", topk_ids, 2, "[T, K]");
  check_sizes(kOp, "topk_ids", topk_ids, {logits.size(0), topk_ids.size(1)});
  check_device(kOp, "topk_ids", topk_ids, logits.device());
  TORCH_CHECK_VALUE(topk_ids.numel() <= std::numeric_limits<int32_t>::max(), kOp,
                    ": expected topk_ids of fewer than 2^31 slots (counts are int32), got ",
                    topk_ids.numel());
}

inline void check_backward(const at::Tensor& grad_sums, const at::Tensor& grad_squares,
                           const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  check_rows(kBackwardOp, logits, mask);
  check_dtype(kBackwardOp, "grad_sums", grad_sums, sum_type(logits));
  check_dtype(kBackwardOp, "grad_squares", grad_squares, sum_type(logits));
  check_sizes(kBackwardOp, "grad_sums", grad_sums, {logits.size(1)});
  check_sizes(kBackwardOp, "grad_squares", grad_squares, {});
  check_device(kBackwardOp, "grad_sums", grad_sums, logits.device());
  check_device(kBackwardOp, "grad_squares", grad_squares, logits.device());
}

}  // namespace mergeme::router_statistics
