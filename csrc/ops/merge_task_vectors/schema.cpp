#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "merge_task_vectors(Tensor base, Tensor[] tensors, Tensor weights, Tensor scales, "
      "Tensor selection, *, str mask, int key, int offset, str elect, bool normalize, float lam) "
      "-> Tensor");
}
