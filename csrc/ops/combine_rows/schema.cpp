#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def(
      "combine_rows(Tensor? base, Tensor[] tensors, Tensor weights, *, str axis, int offset, int "
      "row_length) -> Tensor");
}
