#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) { m.def("first_nonfinite(Tensor tensor) -> Tensor"); }
