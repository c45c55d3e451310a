#include <ATen/ops/_grouped_mm.h>

#include "csrc/ops/grouped_matmul/checks.h"

namespace mergeme::grouped_matmul {
namespace {

// The same product by torch.
template <Layout kLayout>
at::Tensor torch_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  const at::Tensor ends = offsets.slice(0, 1);
  const at::Tensor& left = kLayout == Layout::kTn ? a.t() : a;
  const at::Tensor& right = kLayout == Layout::kNt ? b.transpose(1, 2) : b;
  return at::_grouped_mm(left, right, ends).contiguous();
}

template <Layout kLayout>
at::Tensor run_device(const at::Tensor& a, const at::Tensor& b, const at::Tensor& expert_offsets) {
  check(kLayout, a, b, expert_offsets);
  const DeviceScope device(a);
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  const at::Tensor offsets = expert_offsets.contiguous();
  const std::vector<int64_t> sizes = output_sizes(kLayout, a, b, offsets);
  Params params{.a = left.const_data_ptr(),
                .b = right.const_data_ptr(),
                .expert_offsets = offsets.const_data_ptr<int32_t>(),
                .num_tokens = a.size(0),
                .num_experts = offsets.numel() - 1,
                .a_columns = a.size(1),
                .out_columns = sizes.back(),
                .layout = kLayout,
                .dtype = dtype_of(a)};
  if (torch_is_faster(params)) {
    launch_check(params, device.stream());
    const at::Tensor out = torch_product<kLayout>(left, right, offsets);
    params.out = out.mutable_data_ptr();
    launch_zeros(params, device.stream());
    return out;
  }
  const at::Tensor out = at::empty(sizes, a.options());
  const at::Tensor plan = at::empty({grouped::plan_bytes(params.num_tokens, params.num_experts)},
                                    a.options().dtype(at::kByte));
  params.out = out.mutable_data_ptr();
  params.plan = static_cast<grouped::Plan>(plan.mutable_data_ptr());
  launch(params, device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) {
  m.impl("grouped_matmul_nt", run_device<Layout::kNt>);
  m.impl("grouped_matmul_nn", run_device<Layout::kNn>);
  m.impl("grouped_matmul_tn", run_device<Layout::kTn>);
}

}  // namespace mergeme::grouped_matmul
