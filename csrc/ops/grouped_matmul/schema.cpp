#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def("grouped_matmul_nt(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor");
  m.def("grouped_matmul_nn(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor");
  m.def("grouped_matmul_tn(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor");
}
