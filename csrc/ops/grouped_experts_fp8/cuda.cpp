#include "csrc/ops/grouped_experts_fp8/checks.h"
#include "csrc/ops/grouped_experts_fp8/params.h"

namespace mergeme::grouped_experts_fp8 {
namespace {

at::Tensor run_device(const at::Tensor& x, const at::Tensor& gate_up,
                      const at::Tensor& gate_up_scale, const at::Tensor& down,
                      const at::Tensor& down_scale, const at::Tensor& topk_weights,
                      const at::Tensor& expert_offsets, const at::Tensor& permutation,
                      const at::Tensor& inverse, std::string_view activation) {
  check(x, gate_up, gate_up_scale, down, down_scale, topk_weights, expert_offsets, permutation,
        inverse);
  const Activation kind = grouped_experts::activation_of(kOp, activation);
  const DeviceScope device(x);
  const at::Tensor tokens = x.contiguous(), w_in = gate_up.contiguous(), w_out = down.contiguous();
  const at::Tensor in_scale = gate_up_scale.contiguous(), out_scale = down_scale.contiguous();
  const at::Tensor weights = topk_weights.contiguous(), offsets = expert_offsets.contiguous();
  const at::Tensor slots = permutation.contiguous(), rows = inverse.contiguous();
  const int64_t num_slots = slots.numel(), t = x.size(0), h = x.size(1), i = down.size(2);
  const auto f8 = gate_up.options(), f32 = weights.options();
  const at::Tensor plan =
      at::empty({grouped::plan_bytes(num_slots, gate_up.size(0))}, x.options().dtype(at::kByte));
  const at::Tensor row_tokens = at::empty_like(slots);
  const at::Tensor quantized = at::empty({t, h}, f8);
  const at::Tensor quantized_scale = at::empty({t, scale_blocks(h)}, f32);
  const at::Tensor activated = at::empty({num_slots, i}, f32);
  const at::Tensor activated_q = at::empty({num_slots, i}, f8);
  const at::Tensor activated_scale = at::empty({num_slots, scale_blocks(i)}, f32);
  const at::Tensor expert_out = at::empty({num_slots, h}, f32);
  const at::Tensor out = at::empty({t, h}, x.options());
  launch({.out = out.mutable_data_ptr(),
          .x = tokens.const_data_ptr(),
          .gate_up = static_cast<const float8_e4m3_t*>(w_in.const_data_ptr()),
          .gate_up_scale = in_scale.const_data_ptr<float>(),
          .down = static_cast<const float8_e4m3_t*>(w_out.const_data_ptr()),
          .down_scale = out_scale.const_data_ptr<float>(),
          .topk_weights = weights.const_data_ptr<float>(),
          .expert_offsets = offsets.const_data_ptr<int32_t>(),
          .permutation = slots.const_data_ptr<int32_t>(),
          .inverse = rows.const_data_ptr<int32_t>(),
          .plan = static_cast<grouped::Plan>(plan.mutable_data_ptr()),
          .tokens = row_tokens.mutable_data_ptr<int32_t>(),
          .quantized = static_cast<float8_e4m3_t*>(quantized.mutable_data_ptr()),
          .quantized_scale = quantized_scale.mutable_data_ptr<float>(),
          .activation = activated.mutable_data_ptr<float>(),
          .activation_q = static_cast<float8_e4m3_t*>(activated_q.mutable_data_ptr()),
          .activation_scale = activated_scale.mutable_data_ptr<float>(),
          .expert_out = expert_out.mutable_data_ptr<float>(),
          .num_tokens = t,
          .top_k = weights.size(1),
          .num_experts = gate_up.size(0),
          .hidden = h,
          .intermediate = i,
          .kind = kind,
          .dtype = dtype_of(x)},
         device.stream());
  return out;
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("grouped_experts_fp8", run_device); }

}  // namespace mergeme::grouped_experts_fp8
