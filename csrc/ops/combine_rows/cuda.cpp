#include "csrc/ops/combine_rows/checks.h"

namespace mergeme::combine_rows {
namespace {

at::Tensor run_device(const std::optional<at::Tensor>& base, at::TensorList tensors,
                      const at::Tensor& weights, std::string_view axis, int64_t offset,
                      int64_t row_length) {
  const Axis kind = check(base, tensors, weights, axis, offset, row_length);
  const DeviceScope device(tensors[0]);
  const at::Tensor out = at::empty_like(tensors[0], at::MemoryFormat::Contiguous);
  const at::Tensor from = base ? base->contiguous() : at::Tensor();
  const DeviceModels models(tensors, {});
  const at::Tensor w = weights.contiguous();
  launch({.out = out.mutable_data_ptr(),
          .base = base ? from.const_data_ptr() : nullptr,
          .tensors = models.pointers(),
          .weights = w.const_data_ptr<double>(),
          .num_models = w.size(1),
          .numel = out.numel(),
          .offset = offset,
          .row_length = row_length,
          .aligned = models.aligned() && is_aligned(out) && (!base || is_aligned(from)),
          .axis = kind,
          .dtype = dtype_of(out)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("combine_rows", run_device); }

}  // namespace mergeme::combine_rows
