#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "grouped_experts(Tensor x, Tensor gate_up, Tensor down, Tensor topk_weights, "
      "Tensor expert_offsets, Tensor permutation, Tensor inverse, *, str activation=\"silu\", "
      "bool save=False) -> (Tensor out, Tensor preactivation)");
  m.def(
      "grouped_experts_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, "
      "Tensor topk_weights, Tensor expert_offsets, Tensor permutation, Tensor inverse, "
      "Tensor preactivation, *, str activation=\"silu\", bool[4] output_mask) -> "
      "(Tensor grad_x, Tensor grad_gate_up, Tensor grad_down, Tensor grad_topk_weights)");
}
