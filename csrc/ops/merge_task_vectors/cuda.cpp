#include "csrc/ops/merge_task_vectors/checks.h"

namespace mergeme::merge_task_vectors {
namespace {

at::Tensor run_device(const at::Tensor& base, at::TensorList tensors, const at::Tensor& weights,
                      const at::Tensor& scales, const at::Tensor& selection, std::string_view mask,
                      int64_t key, int64_t offset, std::string_view elect, bool normalize,
                      double lam) {
  const Mask kind = mask_of(kOp, mask);
  check(base, tensors, weights, scales, selection, kind, offset);
  const Elect elected = elect_of(elect);
  const DeviceScope device(base);
  const at::Tensor from = base.contiguous();
  const at::Tensor out = at::empty_like(from);
  const DeviceModels models(tensors, {});
  const at::Tensor w = weights.contiguous(), s = scales.contiguous(), sel = selection.contiguous();
  const auto num_models = int64_t(tensors.size());
  const at::Tensor scratch = at::empty({num_models * kTermBytes + int64_t(sizeof(double))},
                                       base.options().dtype(at::kByte));
  auto* bytes = static_cast<char*>(scratch.mutable_data_ptr());
  launch({.out = out.mutable_data_ptr(),
          .base = from.const_data_ptr(),
          .tensors = models.pointers(),
          .weights = w.const_data_ptr<double>(),
          .scales = s.const_data_ptr<double>(),
          .selection = sel.const_data_ptr<double>(),
          .terms = bytes,
          .total = reinterpret_cast<double*>(bytes + num_models * kTermBytes),
          .num_models = num_models,
          .numel = from.numel(),
          .offset = offset,
          .key = static_cast<uint64_t>(key),
          .lam = lam,
          .mask = kind,
          .elect = elected,
          .normalize = normalize,
          .aligned = models.aligned() && is_aligned(from) && is_aligned(out) && offset % 8 == 0,
          .dtype = dtype_of(base)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("merge_task_vectors", run_device); }

}  // namespace mergeme::merge_task_vectors
