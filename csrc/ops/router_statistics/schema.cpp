#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "router_statistics(Tensor logits, Tensor topk_ids, Tensor? mask=None) -> "
      "(Tensor counts, Tensor probability_sums, Tensor lse_squares)");
  m.def(
      "router_statistics_backward(Tensor grad_sums, Tensor grad_squares, Tensor logits, "
      "Tensor? mask=None) -> Tensor");
}
