#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "sort_by_expert(Tensor topk_ids, int num_experts, Tensor? priority=None, *, "
      "bool sentinel=False, int? capacity=None) -> "
      "(Tensor expert_offsets, Tensor permutation, Tensor inverse)");
}
