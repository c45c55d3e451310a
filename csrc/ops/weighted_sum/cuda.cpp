#include "csrc/ops/weighted_sum/checks.h"
#include "csrc/ops/weighted_sum/params.h"

namespace mergeme::weighted_sum {
namespace {

at::Tensor run_device(at::TensorList tensors, const at::Tensor& weights) {
  check(tensors, weights);
  const DeviceScope device(tensors[0]);
  const at::Tensor out = at::empty_like(tensors[0], at::MemoryFormat::Contiguous);
  const DeviceModels models(tensors, {});
  const at::Tensor w = weights.contiguous();
  launch({.out = out.mutable_data_ptr(),
          .tensors = models.pointers(),
          .weights = w.const_data_ptr<double>(),
          .num_models = w.numel(),
          .numel = out.numel(),
          .aligned = models.aligned() && is_aligned(out),
          .dtype = dtype_of(out)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("weighted_sum", run_device); }

}  // namespace mergeme::weighted_sum
