#pragma once
#include <limits>
#include <string_view>

#include "csrc/common/torch_glue.h"
#include "csrc/ops/topk_gating/params.h"

namespace mergeme::topk_gating {

inline constexpr const char* kOp = "mergeme::topk_gating";
inline constexpr const char* kBackwardOp = "mergeme::topk_gating_backward";

inline at::ScalarType weight_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Score check_score(const char* op, std::string_view score) {
  if (score == "softmax") return Score::kSoftmax;
  if (score == "sigmoid") return Score::kSigmoid;
  if (score == "sqrtsoftplus") return Score::kSqrtSoftplus;
  TORCH_CHECK_VALUE(score == "none", op,
                    ": expected score to be 'softmax', 'sigmoid', 'sqrtsoftplus' or 'none', got '",
                    score, "'");
  return Score::kNone;
}

struct Groups {
  int64_t count;
  int64_t top;
  GroupScore score;
};

inline Groups check_groups(int64_t num_experts, int64_t top_k, int64_t num_groups,
                           int64_t top_groups, std::string_view group_score) {
  TORCH_CHECK_VALUE(num_groups >= 1 && num_groups <= kMaxGroups && num_experts % num_groups == 0,
                    kOp, ": expected num_groups to divide E = ", num_experts, " and be in [1, ",
                    kMaxGroups, "], got ", num_groups);
  const int64_t size = num_experts / num_groups;
  TORCH_CHECK_VALUE(top_groups >= 1 && top_groups <= num_groups, kOp,
                    ": expected top_groups in [1, num_groups = ", num_groups, "], got ",
                    top_groups);
  TORCH_CHECK_VALUE(top_k <= top_groups * size, kOp, ": expected top_k of at most ",
                    top_groups * size, ", the experts of ", top_groups, " groups, got ", top_k);
  TORCH_CHECK_VALUE(group_score == "max" || group_score == "top2", kOp,
                    ": expected group_score to be 'max' or 'top2', got '", group_score, "'");
  const bool top2 = group_score == "top2";
  TORCH_CHECK_VALUE(!top2 || num_groups == 1 || size >= 2, kOp,
                    ": expected groups of at least 2 experts for group_score 'top2', got ", size);
  // With every group taken there is nothing to choose.
  return {top_groups == num_groups ? 1 : num_groups, top_groups == num_groups ? 1 : top_groups,
          top2 ? GroupScore::kTop2 : GroupScore::kMax};
}

inline void check_logits(const char* op, const at::Tensor& logits) {
  check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[T, E]");
  TORCH_CHECK_VALUE(logits.size(1) < std::numeric_limits<int32_t>::max(), op,
                    ": expected fewer than 2^31 - 1 experts (ids are int32), got ", logits.size(1));
}

// Each runs first in every backend. Neither reads an element, so neither synchronises a stream.
inline Score check(const at::Tensor& logits, const std::optional<at::Tensor>& bias, int64_t top_k,
                   std::string_view score) {
  check_logits(kOp, logits);
  if (bias) {
    check_dtype(kOp, "bias", *bias, at::kFloat);
    check_sizes(kOp, "bias", *bias, {logits.size(1)});
    check_device(kOp, "bias", *bias, logits.device());
  }
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= logits.size(1), kOp,
                    ": expected top_k in [1, E = ", logits.size(1), "], got ", top_k);
  return check_score(kOp, score);
}

inline Score check_backward(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& topk_ids, std::string_view score) {
  check_logits(kBackwardOp, logits);
  check_dtype(kBackwardOp, "topk_ids", topk_ids, at::kInt);
  check_dim(kBackwardOp, "topk_ids", topk_ids, 2, "[T, K]");
  check_sizes(kBackwardOp, "topk_ids", topk_ids, {logits.size(0), topk_ids.size(1)});
  check_dtype(kBackwardOp, "grad", grad, weight_type(logits));
  check_sizes(kBackwardOp, "grad", grad, topk_ids.sizes());
  check_device(kBackwardOp, "topk_ids", topk_ids, logits.device());
  check_device(kBackwardOp, "grad", grad, logits.device());
  return check_score(kBackwardOp, score);
}

}  // namespace mergeme::topk_gating
