#include "csrc/ops/gram/checks.h"

namespace mergeme::gram {
namespace {

at::Tensor run_device(const std::optional<at::Tensor>& base, at::TensorList tensors,
                      std::string_view axis) {
  const Vectors vectors = check(base, tensors, axis);
  const DeviceScope device(tensors[0]);
  const at::Tensor from = base ? base->contiguous() : at::Tensor();
  const DeviceModels models(tensors, {});
  const auto num_models = int64_t(tensors.size());
  const int64_t blocks = num_blocks(vectors.axis, vectors.length);
  const auto doubles = tensors[0].options().dtype(at::kDouble);
  const at::Tensor out = at::empty({vectors.groups, num_models, num_models}, doubles);
  const at::Tensor partials = at::empty({vectors.groups * blocks * num_pairs(num_models)}, doubles);
  launch({.out = out.mutable_data_ptr<double>(),
          .base = base ? from.const_data_ptr() : nullptr,
          .tensors = models.pointers(),
          .partials = partials.mutable_data_ptr<double>(),
          .num_models = num_models,
          .groups = vectors.groups,
          .length = vectors.length,
          .blocks = blocks,
          .axis = vectors.axis,
          .dtype = dtype_of(tensors[0])},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("gram", run_device); }

}  // namespace mergeme::gram
