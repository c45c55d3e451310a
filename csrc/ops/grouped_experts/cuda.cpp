#include "csrc/ops/grouped_experts/checks.h"
#include "csrc/ops/grouped_experts/params.h"

namespace mergeme::grouped_experts {
namespace {

// Contiguous inputs and scratch of both directions, kept alive until the launches are queued.
struct Operands {
  at::Tensor x, gate_up, down, topk_weights, expert_offsets, permutation, inverse, plan, tokens;

  Operands(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
           const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
           const at::Tensor& permutation, const at::Tensor& inverse)
      : x(x.contiguous()),
        gate_up(gate_up.contiguous()),
        down(down.contiguous()),
        topk_weights(topk_weights.contiguous()),
        expert_offsets(expert_offsets.contiguous()),
        permutation(permutation.contiguous()),
        inverse(inverse.contiguous()),
        plan(at::empty({grouped::plan_bytes(permutation.numel(), gate_up.size(0))},
                       x.options().dtype(at::kByte))),
        tokens(at::empty_like(this->permutation)) {}

  Common common(Activation kind) const {
    return {.x = x.const_data_ptr(),
            .gate_up = gate_up.const_data_ptr(),
            .down = down.const_data_ptr(),
            .topk_weights = topk_weights.const_data_ptr(),
            .expert_offsets = expert_offsets.const_data_ptr<int32_t>(),
            .permutation = permutation.const_data_ptr<int32_t>(),
            .inverse = inverse.const_data_ptr<int32_t>(),
            .plan = static_cast<grouped::Plan>(plan.mutable_data_ptr()),
            .tokens = tokens.mutable_data_ptr<int32_t>(),
            .num_tokens = x.size(0),
            .top_k = topk_weights.size(1),
            .num_experts = gate_up.size(0),
            .hidden = x.size(1),
            .intermediate = down.size(2),
            .kind = kind,
            .dtype = dtype_of(x)};
  }
};

std::tuple<at::Tensor, at::Tensor> run_device(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_weights, const at::Tensor& expert_offsets, const at::Tensor& permutation,
    const at::Tensor& inverse, std::string_view activation, bool save) {
  check(kOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  const Activation kind = activation_of(kOp, activation);
  const DeviceScope device(x);
  const Operands in(x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  const int64_t num_slots = permutation.numel(), hidden = x.size(1), intermediate = down.size(2);
  const at::Tensor out = at::empty({x.size(0), hidden}, x.options());
  const at::Tensor saved = at::empty({save ? num_slots : 0, 2 * intermediate}, x.options());
  const at::Tensor activated = at::empty({num_slots, intermediate}, x.options());
  const at::Tensor expert_out = at::empty({num_slots, hidden}, topk_weights.options());
  launch({in.common(kind), out.mutable_data_ptr(), save ? saved.mutable_data_ptr() : nullptr,
          activated.mutable_data_ptr(), expert_out.mutable_data_ptr()},
         device.stream());
  return {out, saved};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_device_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_weights, const at::Tensor& expert_offsets, const at::Tensor& permutation,
    const at::Tensor& inverse, const at::Tensor& preactivation, std::string_view activation,
    std::array<bool, 4> output_mask) {
  check(kBackwardOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  check_backward(grad, x, gate_up, topk_weights, preactivation);
  const Activation kind = activation_of(kBackwardOp, activation);
  const DeviceScope device(x);
  const Operands in(x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  const at::Tensor out_grad = grad.contiguous(), saved = preactivation.contiguous();
  const int64_t num_slots = permutation.numel(), hidden = x.size(1), intermediate = down.size(2);
  const auto wanted = [&](int i, const at::Tensor& like) {
    return at::empty(output_mask[i] ? like.sizes() : at::IntArrayRef{0}, like.options());
  };
  const at::Tensor grad_x = wanted(0, x), grad_gate_up = wanted(1, gate_up);
  const at::Tensor grad_down = wanted(2, down), grad_weights = wanted(3, topk_weights);
  const auto pointer = [&](int i, const at::Tensor& t) {
    return output_mask[i] ? t.mutable_data_ptr() : nullptr;
  };
  const auto acc = topk_weights.options();
  const at::Tensor grad_pairs = at::empty({num_slots, 2 * intermediate}, x.options());
  const at::Tensor weighted = at::empty({num_slots, intermediate}, x.options());
  const at::Tensor grad_rows = at::empty({output_mask[0] ? num_slots : 0, hidden}, acc);
  const at::Tensor parts = at::empty({num_slots, num_weight_parts(intermediate)}, acc);
  launch_backward(
      {in.common(kind), pointer(0, grad_x), pointer(1, grad_gate_up), pointer(2, grad_down),
       pointer(3, grad_weights), out_grad.const_data_ptr(), saved.const_data_ptr(),
       grad_pairs.mutable_data_ptr(), weighted.mutable_data_ptr(), grad_rows.mutable_data_ptr(),
       parts.mutable_data_ptr()},
      device.stream());
  return {grad_x, grad_gate_up, grad_down, grad_weights};
}

}  // namespace

MERGEME_DEVICE_IMPL(m) {
  m.impl("grouped_experts", run_device);
  m.impl("grouped_experts_backward", run_device_backward);
}

}  // namespace mergeme::grouped_experts
