#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "grouped_matmul_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, "
      "Tensor expert_offsets, *, ScalarType dtype) -> Tensor");
}
