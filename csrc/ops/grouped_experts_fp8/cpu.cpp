#include "csrc/ops/grouped_experts/cpu_forward.h"
#include "csrc/ops/grouped_experts_fp8/checks.h"
#include "csrc/ops/grouped_experts_fp8/cpu_matrix.h"
#include "csrc/ops/grouped_matmul_fp8/cpu_matrix.h"
#include "csrc/ops/quantize_fp8/cpu_loops.h"

namespace mergeme::grouped_experts_fp8 {
namespace {

// e4m3 numbers in bfloat16, which holds them exactly, and their scales.
struct Quantized {
  at::Tensor q;
  at::Tensor scale;
};

Quantized quantize(const at::Tensor& x) {
  const int64_t columns = x.size(1);
  const at::Tensor q = workspace(x.sizes(), x.options().dtype(at::kBFloat16));
  const at::Tensor scale =
      at::empty({x.size(0), scale_blocks(columns)}, x.options().dtype(at::kFloat));
  const quantize_fp8::Task task{.q = q.mutable_data_ptr(),
                                .scale = scale.mutable_data_ptr<float>(),
                                .x = x.const_data_ptr(),
                                .columns = columns,
                                .dtype = dtype_of(x),
                                .widened = true};
  at::parallel_for(0, x.size(0), quantize_fp8::grain(columns),
                   [&](int64_t begin, int64_t end) { quantize_fp8::quantize(task, begin, end); });
  return {q, scale};
}

at::Tensor run_cpu(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& gate_up_scale,
                   const at::Tensor& down, const at::Tensor& down_scale,
                   const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                   const at::Tensor& permutation, const at::Tensor& inverse,
                   std::string_view activation) {
  check(x, gate_up, gate_up_scale, down, down_scale, topk_weights, expert_offsets, permutation,
        inverse);
  const auto kind = grouped_experts::activation_of(kOp, activation);
  const grouped_experts::Routing routing(kOp, topk_weights, expert_offsets, permutation, inverse);
  const at::Tensor w_in = gate_up.contiguous(), w_out = down.contiguous();
  const at::Tensor in_scale = gate_up_scale.contiguous(), out_scale = down_scale.contiguous();
  const int64_t h = x.size(1), i = down.size(2);
  const int64_t h_blocks = scale_blocks(h), i_blocks = scale_blocks(i);
  const auto weights = [](const at::Tensor& t, int64_t element) {
    return static_cast<const float8_e4m3_t*>(t.const_data_ptr()) + element;
  };

  const Quantized tokens = quantize(x.contiguous());
  const at::Tensor activated = workspace({routing.num_rows, i}, in_scale.options());
  const auto up = plan_tasks(routing.boundaries, ceil_div(i, kPanelColumns / 2), h);
  for_each_task(up, scaled_scratch_for(up, h), [&](const PlannedTask& p, void* scratch) {
    GateUpTask task{.product = {},
                    .activation = activated.mutable_data_ptr<float>() + p.row * i,
                    .intermediate = i,
                    .kind = kind};
    task.product.product = {
        .a = {.data = tokens.q.const_data_ptr(),
              .ld = h,
              .index = routing.slots_from(p.row),
              .divisor = routing.top_k},
        .b = {.data = weights(w_in, p.expert * 2 * i * h), .ld = h, .columns = {.gated_up = i}},
        .rows = p.rows,
        .first_panel = p.first_panel,
        .end_panel = p.end_panel,
        .columns = i,
        .depth = h,
        .dtype = DType::kBFloat16};
    task.product.a_scale = {.data = tokens.scale.const_data_ptr(),
                            .ld = h_blocks,
                            .index = routing.slots_from(p.row),
                            .divisor = routing.top_k};
    task.product.b_scale = in_scale.const_data_ptr<float>() + p.expert * 2 * i_blocks * h_blocks;
    task.product.up_scale = i_blocks;
    MERGEME_CALL_MATRIX(gate_up, task, scratch);
  });

  const Quantized inner = quantize(activated);
  const at::Tensor expert_out = workspace({routing.num_rows, h}, in_scale.options());
  const auto out_tasks = plan_tasks(routing.boundaries, ceil_div(h, kPanelColumns), i);
  for_each_task(
      out_tasks, scaled_scratch_for(out_tasks, i), [&](const PlannedTask& p, void* scratch) {
        ScaledTask task;
        task.product = {.a = {.data = grouped_experts::const_element(inner.q, p.row * i), .ld = i},
                        .b = {.data = weights(w_out, p.expert * h * i), .ld = i},
                        .rows = p.rows,
                        .first_panel = p.first_panel,
                        .end_panel = p.end_panel,
                        .columns = h,
                        .depth = i,
                        .dtype = DType::kBFloat16};
        task.a_scale = {.data = grouped_experts::const_element(inner.scale, p.row * i_blocks),
                        .ld = i_blocks};
        task.b_scale = out_scale.const_data_ptr<float>() + p.expert * h_blocks * i_blocks;
        grouped_matmul_fp8::multiply(task, expert_out.mutable_data_ptr<float>() + p.row * h,
                                     DType::kFloat32, scratch);
      });
  const at::Tensor out = at::empty(x.sizes(), x.options());
  grouped_experts::combine_rows(expert_out, routing, true, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("grouped_experts_fp8", run_cpu); }

}  // namespace mergeme::grouped_experts_fp8
