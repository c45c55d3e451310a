#include "csrc/common/torch_glue.h"

namespace mergeme::packed_experts {
namespace {

// The layout is the CPU loops': a GPU's kernels read the weights as they are.
[[noreturn]] void refuse(const char* op, const char* instead) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "mergeme::", op,
                              ": packed weights are for the CPU; on a GPU use ", instead);
}

at::Tensor pack(const at::Tensor&, bool, bool, bool) {
  refuse("pack_experts", "the weights as they are");
}
at::Tensor unpack(const at::Tensor&, int64_t, int64_t, bool, bool, bool) {
  refuse("unpack_experts", "the weights as they are");
}
at::Tensor experts(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                   std::string_view) {
  refuse("packed_experts", "grouped_experts");
}
at::Tensor matmul(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t) {
  refuse("packed_matmul", "grouped_matmul_nt");
}

}  // namespace

MERGEME_DEVICE_IMPL(m) {
  m.impl("pack_experts", pack);
  m.impl("unpack_experts", unpack);
  m.impl("packed_experts", experts);
  m.impl("packed_matmul", matmul);
}

}  // namespace mergeme::packed_experts
