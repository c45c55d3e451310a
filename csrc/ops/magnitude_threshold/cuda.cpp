#include "csrc/ops/magnitude_threshold/checks.h"
#include "csrc/ops/magnitude_threshold/params.h"

namespace mergeme::magnitude_threshold {
namespace {

at::Tensor run_device(const at::Tensor& base, at::TensorList tensors, at::IntArrayRef keep) {
  check(base, tensors, keep);
  const DeviceScope device(base);
  const at::Tensor from = base.contiguous();
  const DeviceModels models(tensors, keep);
  const auto num_models = int64_t(tensors.size());
  const at::Tensor out = at::empty({num_models, 2}, base.options().dtype(at::kDouble));
  const at::Tensor scratch =
      at::empty({num_models * kScratchBytes}, base.options().dtype(at::kByte));
  auto* states = static_cast<State*>(scratch.mutable_data_ptr());
  auto* histogram = reinterpret_cast<Count*>(states + num_models);
  launch({.out = out.mutable_data_ptr<double>(),
          .base = from.const_data_ptr(),
          .tensors = models.pointers(),
          .keep = models.numbers(),
          .states = states,
          .histogram = histogram,
          .equal = reinterpret_cast<int64_t*>(histogram + num_models * kBins),
          .num_models = num_models,
          .numel = from.numel(),
          .dtype = dtype_of(base)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("magnitude_threshold", run_device); }

}  // namespace mergeme::magnitude_threshold
