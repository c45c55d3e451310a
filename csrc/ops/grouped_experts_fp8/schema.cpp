#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "grouped_experts_fp8(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
      "Tensor down_scale, Tensor topk_weights, Tensor expert_offsets, Tensor permutation, "
      "Tensor inverse, *, str activation=\"silu\") -> Tensor");
}
