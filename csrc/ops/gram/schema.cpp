#include "csrc/common/torch_glue.h"

MERGEME_SCHEMA(m) { m.def("gram(Tensor? base, Tensor[] tensors, *, str axis) -> Tensor"); }
