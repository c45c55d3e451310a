#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "topk_gating(Tensor logits, Tensor? bias, int top_k, *, str score=\"softmax\", "
      "bool renormalize=True, float scale=1.0, int num_groups=1, int top_groups=1, "
      "str group_score=\"max\") -> (Tensor topk_ids, Tensor topk_weights)");
  m.def(
      "topk_gating_backward(Tensor grad, Tensor logits, Tensor topk_ids, *, "
      "str score=\"softmax\", bool renormalize=True, float scale=1.0) -> Tensor");
}
