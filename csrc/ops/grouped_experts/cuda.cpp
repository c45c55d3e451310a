#include "csrc/ops/grouped_experts/composed.h"
#include "csrc/ops/grouped_experts/params.h"

namespace mergeme::grouped_experts {
namespace {

std::tuple<at::Tensor, at::Tensor> run_device(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_weights, const at::Tensor& expert_offsets, const at::Tensor& permutation,
    const at::Tensor& inverse, std::string_view activation_name, bool save) {
  check(kOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  const Activation kind = activation_of(kOp, activation_name);
  TORCH_CHECK_NOT_IMPLEMENTED(kind == Activation::kSilu, kOp, ": ", activation_name);
  const at::Tensor preactivation =
      save ? grouped_matmul("nt", x.index_select(0, tokens_of(permutation, topk_weights.size(1))),
                            gate_up, expert_offsets)
           : at::empty({0, gate_up.size(1)}, x.options());
  const DeviceScope device(x);
  const at::Tensor tokens = x.contiguous(), w_in = gate_up.contiguous(), w_out = down.contiguous();
  const at::Tensor weights = topk_weights.contiguous(), offsets = expert_offsets.contiguous();
  const at::Tensor slots = permutation.contiguous(), rows = inverse.contiguous();
  const int64_t hidden = x.size(1), intermediate = down.size(2), num_slots = weights.numel();
  const at::Tensor out = at::empty({x.size(0), hidden}, x.options());
  const at::Tensor activation = at::empty({num_slots, intermediate}, x.options());
  const at::Tensor expert_out = at::empty({num_slots, hidden}, weights.options());
  launch({.out = out.mutable_data_ptr(),
          .activation = activation.mutable_data_ptr(),
          .expert_out = expert_out.mutable_data_ptr(),
          .x = tokens.const_data_ptr(),
          .gate_up = w_in.const_data_ptr(),
          .down = w_out.const_data_ptr(),
          .topk_weights = weights.const_data_ptr(),
          .expert_offsets = offsets.const_data_ptr<int32_t>(),
          .permutation = slots.const_data_ptr<int32_t>(),
          .inverse = rows.const_data_ptr<int32_t>(),
          .num_tokens = x.size(0),
          .top_k = weights.size(1),
          .num_experts = gate_up.size(0),
          .hidden = hidden,
          .intermediate = intermediate,
          .dtype = dtype_of(x)},
         device.stream());
  return {out, preactivation};
}

auto run_device_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up,
                         const at::Tensor& down, const at::Tensor& topk_weights,
                         const at::Tensor& expert_offsets, const at::Tensor& permutation,
                         const at::Tensor& inverse, const at::Tensor& preactivation,
                         std::string_view activation, std::array<bool, 4> output_mask) {
  check(kBackwardOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  check_backward(grad, x, gate_up, topk_weights, preactivation);
  return composed_backward(grad, x, gate_up, down, topk_weights, expert_offsets, permutation,
                           inverse, preactivation, activation_of(kBackwardOp, activation),
                           output_mask);
}

}  // namespace

MERGEME_DEVICE_IMPL(m) {
  m.impl("grouped_experts", run_device);
  m.impl("grouped_experts_backward", run_device_backward);
}

}  // namespace mergeme::grouped_experts
