#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::topk_gating {

enum class Score : int32_t { kSoftmax, kSigmoid, kSqrtSoftplus, kNone };
enum class GroupScore : int32_t { kMax, kTop2 };

inline constexpr int64_t kMaxGroups =
    1024;  // a block of tokens keeps its groups' keys in shared memory

struct Params {
  const void* logits;  // [T, E]
  const float* bias;   // [E], or null
  int32_t* ids;        // [T, K], out
  void* weights;       // [T, K], out; float, double for float64 logits
  int64_t num_tokens;
  int64_t num_experts;  // below 2^31 - 1
  int64_t top_k;        // in [1, num_experts]
  int64_t num_groups;   // G, divides num_experts
  int64_t top_groups;   // in [1, G], with at least top_k experts
  double scale;
  DType dtype;  // of logits
  Score score;
  GroupScore group_score;
  bool renormalize;
};

struct BackwardParams {
  const void* grad;    // [T, K], the type of the weights
  const void* logits;  // [T, E]
  const int32_t* ids;  // [T, K], distinct in a row, each in [0, E)
  void* grad_logits;   // [T, E], out, the type of logits
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
  double scale;
  DType dtype;
  Score score;
  bool renormalize;
};

void launch(const Params& params, void* stream);
void launch_backward(const BackwardParams& params, void* stream);

}  // namespace mergeme::topk_gating
