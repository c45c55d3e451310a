#include "csrc/common/torch_models.h"
#include "csrc/ops/first_nonfinite/checks.h"
#include "csrc/ops/first_nonfinite/params.h"

namespace mergeme::first_nonfinite {
namespace {

at::Tensor run_device(const at::Tensor& tensor) {
  check(tensor);
  const DeviceScope device(tensor);
  const at::Tensor from = tensor.contiguous();
  const auto longs = tensor.options().dtype(at::kLong);
  const at::Tensor out = at::empty({}, longs);
  const at::Tensor partials = at::empty({kMaxBlocks}, longs);
  launch({.out = out.mutable_data_ptr<int64_t>(),
          .tensor = from.const_data_ptr(),
          .partials = partials.mutable_data_ptr<int64_t>(),
          .numel = from.numel(),
          .blocks = 0,
          .aligned = is_aligned(from),
          .dtype = dtype_of(tensor)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("first_nonfinite", run_device); }

}  // namespace mergeme::first_nonfinite
