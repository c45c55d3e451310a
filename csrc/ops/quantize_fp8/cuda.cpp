#include "csrc/ops/quantize_fp8/checks.h"

namespace mergeme::quantize_fp8 {
namespace {

std::tuple<at::Tensor, at::Tensor> run_device(const at::Tensor& x) {
  check(x);
  const DeviceScope device(x);
  const at::Tensor from = x.contiguous();
  const int64_t blocks = scale_blocks(x.size(1));
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn));
  const at::Tensor scale = at::empty({x.size(0), blocks}, x.options().dtype(at::kFloat));
  launch({.q = static_cast<float8_e4m3_t*>(q.mutable_data_ptr()),
          .scale = scale.mutable_data_ptr<float>(),
          .x = from.const_data_ptr(),
          .num_rows = x.size(0),
          .columns = x.size(1),
          .blocks = blocks,
          .dtype = dtype_of(x)},
         device.stream());
  return {q, scale};
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("quantize_fp8", run_device); }

}  // namespace mergeme::quantize_fp8
