#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) {
  m.def("magnitude_threshold(Tensor base, Tensor[] tensors, int[] keep) -> Tensor");
}
