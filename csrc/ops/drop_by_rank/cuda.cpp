#include "csrc/ops/drop_by_rank/checks.h"
#include "csrc/ops/drop_by_rank/params.h"

namespace mergeme::drop_by_rank {
namespace {

at::Tensor run_device(const at::Tensor& base, at::TensorList tensors, const at::Tensor& selection,
                      int64_t key, int64_t offset, bool inverse_prob) {
  check(base, tensors, selection, offset);
  const at::Tensor out = empty_output(base, tensors);
  const DeviceScope device(base);
  const at::Tensor from = base.contiguous();
  const DeviceModels models(tensors, {});
  const at::Tensor sel = selection.contiguous();
  const auto num_models = int64_t(tensors.size());
  const int64_t length = row_length(from), rows = length > 0 ? from.numel() / length : 0;
  const at::Tensor scratch =
      at::empty({scratch_bytes(num_blocks(num_models, rows), length, dtype_of(base))},
                base.options().dtype(at::kByte));
  launch({.out = out.mutable_data_ptr(),
          .base = from.const_data_ptr(),
          .tensors = models.pointers(),
          .selection = sel.const_data_ptr<double>(),
          .scratch = scratch.mutable_data_ptr(),
          .num_models = num_models,
          .rows = rows,
          .length = length,
          .offset = offset,
          .key = static_cast<uint64_t>(key),
          .inverse_prob = inverse_prob,
          .dtype = dtype_of(base)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("drop_by_rank", run_device); }

}  // namespace mergeme::drop_by_rank
