#include "csrc/ops/masked_norms/checks.h"
#include "csrc/ops/masked_norms/params.h"

namespace mergeme::masked_norms {
namespace {

at::Tensor run_device(const at::Tensor& base, at::TensorList tensors, const at::Tensor& selection,
                      std::string_view mask, int64_t key) {
  const Mask kind = mask_of(kOp, mask);
  check(base, tensors, selection, kind);
  const DeviceScope device(base);
  const at::Tensor from = base.contiguous();
  const DeviceModels models(tensors, {});
  const at::Tensor sel = selection.contiguous();
  const auto num_models = int64_t(tensors.size());
  const auto doubles = base.options().dtype(at::kDouble);
  const at::Tensor out = at::empty({num_models, kNorms}, doubles);
  const at::Tensor partials =
      at::empty({num_models, ceil_div(from.numel(), kSumBlock), kNorms}, doubles);
  const at::Tensor terms = at::empty({num_models * kTermBytes}, base.options().dtype(at::kByte));
  launch({.out = out.mutable_data_ptr<double>(),
          .base = from.const_data_ptr(),
          .tensors = models.pointers(),
          .selection = sel.const_data_ptr<double>(),
          .terms = terms.mutable_data_ptr(),
          .partials = partials.mutable_data_ptr<double>(),
          .num_models = num_models,
          .numel = from.numel(),
          .key = static_cast<uint64_t>(key),
          .mask = kind,
          .dtype = dtype_of(base)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("masked_norms", run_device); }

}  // namespace mergeme::masked_norms
