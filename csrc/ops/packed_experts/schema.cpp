#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "pack_experts(Tensor weight, *, bool gated=False, bool interleaved=False, "
      "bool transposed=False) -> Tensor");
  m.def(
      "unpack_experts(Tensor packed, *, int rows, int depth, bool gated=False, "
      "bool interleaved=False, bool transposed=False) -> Tensor");
  m.def(
      "packed_experts(Tensor x, Tensor gate_up, Tensor down, Tensor topk_weights, "
      "Tensor expert_offsets, Tensor permutation, Tensor inverse, *, int intermediate, "
      "str activation=\"silu\") -> Tensor");
  m.def("packed_matmul(Tensor a, Tensor packed, Tensor expert_offsets, *, int columns) -> Tensor");
}
