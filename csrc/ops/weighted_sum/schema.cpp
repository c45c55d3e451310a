#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) { m.def("weighted_sum(Tensor[] tensors, Tensor weights) -> Tensor"); }
