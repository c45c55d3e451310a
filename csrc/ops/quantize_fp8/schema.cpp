#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) { m.def("quantize_fp8(Tensor x) -> (Tensor q, Tensor scale)"); }
