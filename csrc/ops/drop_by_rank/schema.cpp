#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "drop_by_rank(Tensor base, Tensor[] tensors, Tensor selection, *, int key, int offset, "
      "bool inverse_prob) -> Tensor");
}
