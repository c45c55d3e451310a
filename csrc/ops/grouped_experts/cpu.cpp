#include <cstring>

#include "csrc/ops/grouped_experts/cpu_forward.h"
#include "csrc/ops/grouped_matmul/cpu_matrix.h"

namespace mergeme::grouped_experts {
namespace {

void check_slots(const char* op, const char* name, const at::Tensor& slots) {
  const int32_t* ptr = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i)
    TORCH_CHECK_INDEX(ptr[i] >= 0 && ptr[i] < slots.numel(), op, ": expected ", name, " in [0, ",
                      slots.numel(), "), got ", ptr[i], " at position ", i);
}

void clear_rows(const at::Tensor& t, int64_t first) {
  const int64_t used = first * t.size(1) * t.element_size();
  if (t.size(0) > first)
    std::memset(static_cast<char*>(t.mutable_data_ptr()) + used, 0, t.nbytes() - used);
}

}  // namespace

Routing::Routing(const char* op, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                 const at::Tensor& permutation, const at::Tensor& inverse)
    : weights(topk_weights.contiguous()),
      slots(permutation.contiguous()),
      rows(inverse.contiguous()),
      num_slots(topk_weights.numel()),
      num_experts(expert_offsets.numel() - 1),
      top_k(topk_weights.size(1)) {
  const at::Tensor offsets = expert_offsets.contiguous();
  const int32_t* begin = offsets.const_data_ptr<int32_t>();
  check_expert_offsets(op, begin, num_experts, num_slots);
  check_slots(op, "permutation", slots);
  check_slots(op, "inverse", rows);
  boundaries.assign(begin, begin + num_experts + 1);
  num_rows = boundaries.back();
}

void combine_rows(const at::Tensor& rows, const Routing& routing, bool weighted,
                  const at::Tensor& out) {
  const CombineTask task{.out = out.mutable_data_ptr(),
                         .rows = rows.const_data_ptr(),
                         .weights = weighted ? routing.weights.const_data_ptr() : nullptr,
                         .inverse = routing.rows.const_data_ptr<int32_t>(),
                         .num_rows = routing.num_rows,
                         .top_k = routing.top_k,
                         .hidden = out.size(1),
                         .dtype = dtype_of(out)};
  at::parallel_for(0, out.size(0), 16, [&](int64_t begin, int64_t end) {
    MERGEME_CALL_LOOPS(combine, task, begin, end);
  });
}

void forward(const at::Tensor& x, const Weights& weights, const Routing& routing, Activation kind,
             const at::Tensor& out, const at::Tensor& preactivation) {
  const int64_t h = x.size(1), i = weights.intermediate;
  const DType dtype = dtype_of(x);
  const at::Tensor activation = workspace({routing.num_rows, i}, x.options());
  const at::Tensor expert_out = workspace({routing.num_rows, h}, routing.weights.options());
  clear_rows(preactivation, std::min(routing.num_rows, preactivation.size(0)));

  const auto up = plan_tasks(routing.boundaries, ceil_div(i, kPanelColumns / 2), h);
  for_each_task(up, scratch_for(up, h, x), [&](const PlannedTask& p, void* scratch) {
    GateUpTask task{.product = {.a = {.data = x.const_data_ptr(),
                                      .ld = h,
                                      .index = routing.slots_from(p.row),
                                      .divisor = routing.top_k},
                                .rows = p.rows,
                                .first_panel = p.first_panel,
                                .end_panel = p.end_panel,
                                .columns = i,
                                .depth = h,
                                .dtype = dtype},
                    .activation = element(activation, p.row * i),
                    .preactivation =
                        preactivation.size(0) > 0 ? element(preactivation, 2 * p.row * i) : nullptr,
                    .intermediate = i,
                    .kind = kind};
    if (weights.packed)
      task.product.packed = const_element(weights.gate_up, p.expert * weights.gate_up.stride(0));
    else
      task.product.b = {.data = const_element(weights.gate_up, p.expert * 2 * i * h),
                        .ld = h,
                        .columns = {.gated_up = i}};
    MERGEME_CALL_MATRIX(gate_up, task, scratch);
  });
  const auto down = plan_tasks(routing.boundaries, ceil_div(h, kPanelColumns), i);
  for_each_task(down, scratch_for(down, i, x), [&](const PlannedTask& p, void* scratch) {
    PanelTask task{.a = {.data = const_element(activation, p.row * i), .ld = i},
                   .rows = p.rows,
                   .first_panel = p.first_panel,
                   .end_panel = p.end_panel,
                   .columns = h,
                   .depth = i,
                   .dtype = dtype};
    if (weights.packed)
      task.packed = const_element(weights.down, p.expert * weights.down.stride(0));
    else
      task.b = {.data = const_element(weights.down, p.expert * h * i), .ld = i};
    grouped_matmul::multiply(task, element(expert_out, p.row * h), h, true, scratch);
  });
  combine_rows(expert_out, routing, true, out);
}

namespace {

std::tuple<at::Tensor, at::Tensor> run_cpu(const at::Tensor& x, const at::Tensor& gate_up,
                                           const at::Tensor& down, const at::Tensor& topk_weights,
                                           const at::Tensor& expert_offsets,
                                           const at::Tensor& permutation, const at::Tensor& inverse,
                                           std::string_view activation, bool save) {
  check(kOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  const Activation kind = activation_of(kOp, activation);
  const Routing routing(kOp, topk_weights, expert_offsets, permutation, inverse);
  const at::Tensor out = at::empty(x.sizes(), x.options());
  const at::Tensor preactivation =
      at::empty({save ? routing.num_slots : 0, gate_up.size(1)}, x.options());
  const Weights weights{gate_up.contiguous(), down.contiguous(), down.size(2), false};
  forward(x.contiguous(), weights, routing, kind, out, preactivation);
  return {out, preactivation};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_cpu_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_weights, const at::Tensor& expert_offsets, const at::Tensor& permutation,
    const at::Tensor& inverse, const at::Tensor& preactivation, std::string_view activation,
    std::array<bool, 4> output_mask) {
  check(kBackwardOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  check_backward(grad, x, gate_up, topk_weights, preactivation);
  const Activation kind = activation_of(kBackwardOp, activation);
  const Routing routing(kBackwardOp, topk_weights, expert_offsets, permutation, inverse);
  const at::Tensor grad_out = grad.contiguous(), tokens = x.contiguous();
  const at::Tensor w_in = gate_up.contiguous(), w_out = down.contiguous();
  const at::Tensor pre = preactivation.contiguous();
  const int64_t h = x.size(1), i = down.size(2), num_rows = routing.num_rows;
  const int64_t panels = ceil_div(i, kPanelColumns);
  const DType dtype = dtype_of(x);
  const auto wanted = [&](int n, const at::Tensor& like) {
    return output_mask[n] ? at::empty(like.sizes(), like.options())
                          : at::empty({0}, like.options());
  };
  const at::Tensor grad_x = wanted(0, x), grad_gate_up = wanted(1, gate_up);
  const at::Tensor grad_down = wanted(2, down), grad_weights = wanted(3, topk_weights);
  const bool needs_pair = output_mask[0] || output_mask[1];

  // The gradient of the activations, and with it all that is elementwise.
  const at::Tensor grad_pair = workspace({needs_pair ? num_rows : 0, 2 * i}, x.options());
  const at::Tensor weighted = workspace({output_mask[2] ? num_rows : 0, i}, x.options());
  const at::Tensor dots = at::empty({num_rows, panels}, topk_weights.options());
  const Operand grad_rows{.data = grad_out.const_data_ptr(), .ld = h, .divisor = routing.top_k};
  const Operand token_rows{.data = tokens.const_data_ptr(), .ld = h, .divisor = routing.top_k};
  const auto from_row = [&](Operand rows, int64_t row, bool across) {
    rows.index = routing.slots_from(row);
    rows.across = across;
    return rows;
  };
  const auto product = [&](const PlannedTask& p, int64_t columns, int64_t depth) {
    return PanelTask{.rows = p.rows,
                     .first_panel = p.first_panel,
                     .end_panel = p.end_panel,
                     .columns = columns,
                     .depth = depth,
                     .dtype = dtype};
  };
  const auto first = plan_tasks(routing.boundaries, panels, h);
  for_each_task(first, scratch_for(first, h, x), [&](const PlannedTask& p, void* scratch) {
    ActivationBackwardTask task{
        .product = product(p, i, h),
        .preactivation = const_element(pre, 2 * p.row * i),
        .grad_preactivation = needs_pair ? element(grad_pair, 2 * p.row * i) : nullptr,
        .weighted_activation = output_mask[2] ? element(weighted, p.row * i) : nullptr,
        .weight_dots = element(dots, p.row * panels),
        .weights = routing.weights.const_data_ptr(),
        .slots = routing.slots_from(p.row),
        .intermediate = i,
        .panels = panels,
        .kind = kind};
    task.product.a = from_row(grad_rows, p.row, false);
    task.product.b = {.data = const_element(w_out, p.expert * h * i), .ld = i, .across = true};
    MERGEME_CALL_MATRIX(activation_backward, task, scratch);
  });
  if (output_mask[3]) {
    dispatch_floating(dtype, [&]<typename T>() {
      using Acc = acc_t<T>;
      const Acc* from = static_cast<const Acc*>(dots.const_data_ptr());
      Acc* to = static_cast<Acc*>(grad_weights.mutable_data_ptr());
      for (int64_t slot = 0; slot < routing.num_slots; ++slot) {
        const int64_t row = routing.rows.const_data_ptr<int32_t>()[slot];
        Acc sum = 0;
        for (int64_t p = 0; p < panels && row < num_rows; ++p) sum += from[row * panels + p];
        to[slot] = sum;
      }
    });
  }
  // Gradients of weights: every expert's rows are the depth.
  const auto weight_gradient = [&](const at::Tensor& out, int64_t rows, int64_t columns, auto left,
                                   auto right) {
    std::vector<int64_t> boundaries(routing.num_experts + 1);
    int64_t deepest = 0;
    for (int64_t e = 0; e < routing.num_experts; ++e) {
      boundaries[e + 1] = (e + 1) * rows;
      deepest = std::max(deepest, routing.boundaries[e + 1] - routing.boundaries[e]);
    }
    const auto tasks = plan_tasks(boundaries, ceil_div(columns, kPanelColumns), deepest);
    for_each_task(tasks, scratch_for(tasks, deepest, x), [&](const PlannedTask& p, void* scratch) {
      const int64_t begin = routing.boundaries[p.expert];
      PanelTask task = product(p, columns, routing.boundaries[p.expert + 1] - begin);
      task.first_row = p.row - boundaries[p.expert];
      task.a = left(begin);
      task.b = right(begin);
      grouped_matmul::multiply(task, element(out, p.row * columns), columns, false, scratch);
    });
  };
  const auto own_rows = [&](const at::Tensor& rows, int64_t row, bool across) {
    const int64_t ld = rows.size(1);
    return Operand{.data = const_element(rows, row * ld), .ld = ld, .across = across};
  };
  if (output_mask[2])
    weight_gradient(
        grad_down, h, i, [&](int64_t row) { return from_row(grad_rows, row, true); },
        [&](int64_t row) { return own_rows(weighted, row, true); });
  if (output_mask[1])
    weight_gradient(
        grad_gate_up, 2 * i, h, [&](int64_t row) { return own_rows(grad_pair, row, true); },
        [&](int64_t row) { return from_row(token_rows, row, true); });
  if (output_mask[0]) {
    const at::Tensor by_row = workspace({num_rows, h}, topk_weights.options());
    const auto last = plan_tasks(routing.boundaries, ceil_div(h, kPanelColumns), 2 * i);
    for_each_task(last, scratch_for(last, 2 * i, x), [&](const PlannedTask& p, void* scratch) {
      PanelTask task = product(p, h, 2 * i);
      task.a = own_rows(grad_pair, p.row, false);
      task.b = {.data = const_element(w_in, p.expert * 2 * i * h), .ld = h, .across = true};
      grouped_matmul::multiply(task, element(by_row, p.row * h), h, true, scratch);
    });
    combine_rows(by_row, routing, false, grad_x);
  }
  return {grad_x, grad_gate_up, grad_down, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) {
  m.impl("grouped_experts", run_cpu);
  m.impl("grouped_experts_backward", run_cpu_backward);
}

}  // namespace mergeme::grouped_experts
