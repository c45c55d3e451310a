#include "csrc/ops/grouped_matmul/checks.h"

namespace mergeme::grouped_matmul {
namespace {

template <Layout kLayout>
at::Tensor run_device(const at::Tensor& a, const at::Tensor& b, const at::Tensor& expert_offsets) {
  check(kLayout, a, b, expert_offsets);
  const DeviceScope device(a);
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  const at::Tensor offsets = expert_offsets.contiguous();
  const at::Tensor out = at::empty(output_sizes(kLayout, a, b, offsets), a.options());
  const at::Tensor plan = at::empty({grouped::plan_bytes(a.size(0), offsets.numel() - 1)},
                                    a.options().dtype(at::kByte));
  launch({.out = out.mutable_data_ptr(),
          .a = left.const_data_ptr(),
          .b = right.const_data_ptr(),
          .expert_offsets = offsets.const_data_ptr<int32_t>(),
          .plan = static_cast<grouped::Plan>(plan.mutable_data_ptr()),
          .num_tokens = a.size(0),
          .num_experts = offsets.numel() - 1,
          .a_columns = a.size(1),
          .out_columns = out.size(-1),
          .layout = kLayout,
          .dtype = dtype_of(a)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) {
  m.impl("grouped_matmul_nt", run_device<Layout::kNt>);
  m.impl("grouped_matmul_nn", run_device<Layout::kNn>);
  m.impl("grouped_matmul_tn", run_device<Layout::kTn>);
}

}  // namespace mergeme::grouped_matmul
