#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "grouped_experts(Tensor x, Tensor gate_up, Tensor down, Tensor topk_weights, "
      "Tensor expert_offsets, Tensor permutation, Tensor inverse) -> Tensor");
}
