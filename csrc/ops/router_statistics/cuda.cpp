#include <ATen/ops/zeros.h>

#include "csrc/ops/router_statistics/checks.h"
#include "csrc/ops/router_statistics/params.h"

namespace mergeme::router_statistics {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_device(const at::Tensor& logits,
                                                          const at::Tensor& topk_ids,
                                                          const std::optional<at::Tensor>& mask) {
  check(logits, topk_ids, mask);
  const DeviceScope device(logits);
  const at::Tensor z = logits.contiguous(), ids = topk_ids.contiguous();
  const at::Tensor m = mask ? mask->contiguous() : at::Tensor();
  const int64_t num_experts = z.size(1), chunk = chunk_size(z.size(0));
  const int64_t num_chunks = ceil_div(z.size(0), chunk);
  const auto options = z.options().dtype(sum_type(z));
  const at::Tensor counts = at::zeros({num_experts}, z.options().dtype(at::kInt));
  const at::Tensor sums = at::empty({num_experts}, options);
  const at::Tensor squares = at::empty({}, options);
  const at::Tensor partials = at::empty({num_chunks, num_experts + 1}, options);
  launch({.logits = z.const_data_ptr(),
          .ids = ids.const_data_ptr<int32_t>(),
          .mask = mask ? m.const_data_ptr<bool>() : nullptr,
          .counts = counts.mutable_data_ptr<int32_t>(),
          .sums = sums.mutable_data_ptr(),
          .squares = squares.mutable_data_ptr(),
          .partials = partials.mutable_data_ptr(),
          .num_tokens = z.size(0),
          .num_experts = num_experts,
          .top_k = ids.size(1),
          .chunk = chunk,
          .num_chunks = num_chunks,
          .dtype = dtype_of(z)},
         device.stream());
  return {counts, sums, squares};
}

at::Tensor run_device_backward(const at::Tensor& grad_sums, const at::Tensor& grad_squares,
                               const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  check_backward(grad_sums, grad_squares, logits, mask);
  const DeviceScope device(logits);
  const at::Tensor g = grad_sums.contiguous(), z = logits.contiguous();
  const at::Tensor m = mask ? mask->contiguous() : at::Tensor();
  const at::Tensor out = at::empty(z.sizes(), z.options());
  launch_backward({.grad_sums = g.const_data_ptr(),
                   .grad_squares = grad_squares.const_data_ptr(),
                   .logits = z.const_data_ptr(),
                   .mask = mask ? m.const_data_ptr<bool>() : nullptr,
                   .grad_logits = out.mutable_data_ptr(),
                   .num_tokens = z.size(0),
                   .num_experts = z.size(1),
                   .dtype = dtype_of(z)},
                  device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) {
  m.impl("router_statistics", run_device);
  m.impl("router_statistics_backward", run_device_backward);
}

}  // namespace mergeme::router_statistics
