#include "csrc/ops/grouped_matmul_fp8/checks.h"
#include "csrc/ops/grouped_matmul_fp8/params.h"

namespace mergeme::grouped_matmul_fp8 {
namespace {

at::Tensor run_device(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                      const at::Tensor& b_scale, const at::Tensor& expert_offsets,
                      at::ScalarType dtype) {
  check(a, a_scale, b, b_scale, expert_offsets, dtype);
  const DeviceScope device(a);
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  const at::Tensor left_scale = a_scale.contiguous(), right_scale = b_scale.contiguous();
  const at::Tensor offsets = expert_offsets.contiguous();
  const at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
  const at::Tensor plan =
      at::empty({grouped::plan_bytes(a.size(0), b.size(0))}, a.options().dtype(at::kByte));
  launch({.out = out.mutable_data_ptr(),
          .a = static_cast<const float8_e4m3_t*>(left.const_data_ptr()),
          .a_scale = left_scale.const_data_ptr<float>(),
          .b = static_cast<const float8_e4m3_t*>(right.const_data_ptr()),
          .b_scale = right_scale.const_data_ptr<float>(),
          .expert_offsets = offsets.const_data_ptr<int32_t>(),
          .plan = static_cast<grouped::Plan>(plan.mutable_data_ptr()),
          .num_rows = a.size(0),
          .num_experts = b.size(0),
          .depth = a.size(1),
          .columns = b.size(1),
          .dtype = dtype_of(out)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("grouped_matmul_fp8", run_device); }

}  // namespace mergeme::grouped_matmul_fp8
