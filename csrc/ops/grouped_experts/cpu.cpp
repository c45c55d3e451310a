#include "csrc/ops/grouped_experts/composed.h"
#include "csrc/ops/grouped_experts/cpu_loops.h"

namespace mergeme::grouped_experts {
namespace {

// As in grouped_matmul's nt; gate and up share a block's sums.
constexpr int64_t kRows = 128, kColumns = kMaxBlockSums / kRows;

void check_slots(const char* name, const at::Tensor& slots) {
  const int32_t* ptr = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i)
    TORCH_CHECK_INDEX(ptr[i] >= 0 && ptr[i] < slots.numel(), kOp, ": expected ", name, " in [0, ",
                      slots.numel(), "), got ", ptr[i], " at position ", i);
}

char* element(const at::Tensor& t, int64_t i) {
  return static_cast<char*>(t.mutable_data_ptr()) + i * t.element_size();
}
const char* const_element(const at::Tensor& t, int64_t i) {
  return static_cast<const char*>(t.const_data_ptr()) + i * t.element_size();
}

std::tuple<at::Tensor, at::Tensor> run_cpu(const at::Tensor& x, const at::Tensor& gate_up,
                                           const at::Tensor& down, const at::Tensor& topk_weights,
                                           const at::Tensor& expert_offsets,
                                           const at::Tensor& permutation, const at::Tensor& inverse,
                                           std::string_view activation_name, bool save) {
  check(kOp, x, gate_up, down, topk_weights, expert_offsets, permutation, inverse);
  const Activation kind = activation_of(kOp, activation_name);
  TORCH_CHECK_NOT_IMPLEMENTED(kind == Activation::kSilu, kOp, ": ", activation_name);
  const at::Tensor preactivation =
      save ? grouped_matmul("nt", x.index_select(0, tokens_of(permutation, topk_weights.size(1))),
                            gate_up, expert_offsets)
           : at::empty({0, gate_up.size(1)}, x.options());
  const at::Tensor tokens = x.contiguous(), w_in = gate_up.contiguous(), w_out = down.contiguous();
  const at::Tensor weights = topk_weights.contiguous(), offsets = expert_offsets.contiguous();
  const at::Tensor slots = permutation.contiguous(), rows = inverse.contiguous();
  const int64_t num_slots = topk_weights.numel(), num_experts = gate_up.size(0);
  check_expert_offsets(kOp, offsets.const_data_ptr<int32_t>(), num_experts, num_slots);
  check_slots("permutation", slots);
  check_slots("inverse", rows);

  const int64_t h = x.size(1), i = down.size(2), top_k = topk_weights.size(1);
  const at::Tensor out = at::empty({x.size(0), h}, x.options());
  const at::Tensor activation = at::empty({num_slots, i}, x.options());
  const at::Tensor expert_out = at::empty({num_slots, h}, topk_weights.options());
  const int32_t* offsets_ptr = offsets.const_data_ptr<int32_t>();
  const std::vector<int64_t> boundaries(offsets_ptr, offsets_ptr + num_experts + 1);
  const DType dtype = dtype_of(x);

  for_each_block(plan_blocks(boundaries, i, kRows, kColumns / 2), [&](const PlannedBlock& p,
                                                                      void* scratch) {
    const GateUpBlock task{.block = {.a = tokens.const_data_ptr(),
                                     .b = const_element(w_in, (p.expert * 2 * i + p.column) * h),
                                     .out = element(activation, p.row * i + p.column),
                                     .rows = p.rows,
                                     .columns = p.columns,
                                     .depth = h,
                                     .lda = h,
                                     .ldb = h,
                                     .ldo = i,
                                     .dtype = dtype},
                           .slots = slots.const_data_ptr<int32_t>() + p.row,
                           .top_k = top_k,
                           .up_offset = i * h};
    MERGEME_CALL_LOOPS(gate_up, task, scratch);
  });
  for_each_block(
      plan_blocks(boundaries, h, kRows, kColumns), [&](const PlannedBlock& p, void* scratch) {
        const GroupedBlock block{.a = const_element(activation, p.row * i),
                                 .b = const_element(w_out, (p.expert * h + p.column) * i),
                                 .out = element(expert_out, p.row * h + p.column),
                                 .rows = p.rows,
                                 .columns = p.columns,
                                 .depth = i,
                                 .lda = i,
                                 .ldb = i,
                                 .ldo = h,
                                 .dtype = dtype};
        MERGEME_CALL_LOOPS(multiply_down, block, scratch);
      });
  const CombineTask task{.out = out.mutable_data_ptr(),
                         .expert_out = expert_out.const_data_ptr(),
                         .weights = weights.const_data_ptr(),
                         .inverse = rows.const_data_ptr<int32_t>(),
                         .top_k = top_k,
                         .hidden = h,
                         .dtype = dtype};
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    MERGEME_CALL_LOOPS(combine, task, begin, end);
  });
  return {out, preactivation};
}

auto run_cpu_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up,
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

TORCH_LIBRARY_IMPL(mergeme, CPU, m) {
  m.impl("grouped_experts", run_cpu);
  m.impl("grouped_experts_backward", run_cpu_backward);
}

}  // namespace mergeme::grouped_experts
