#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "masked_norms(Tensor base, Tensor[] tensors, Tensor selection, *, str mask, int key) -> "
      "Tensor");
}
