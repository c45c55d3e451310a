#include <cstring>

#include "csrc/ops/grouped_matmul_fp8/checks.h"
#include "csrc/ops/grouped_matmul_fp8/cpu_matrix.h"
#include "csrc/ops/quantize_fp8/cpu_loops.h"

namespace mergeme::grouped_matmul_fp8 {
namespace {

// The same numbers in bfloat16, contiguous.
at::Tensor widened(const at::Tensor& q) {
  const at::Tensor from = q.contiguous();
  const at::Tensor to = workspace(q.sizes(), q.options().dtype(at::kBFloat16));
  const auto* source = static_cast<const float8_e4m3_t*>(from.const_data_ptr());
  auto* target = static_cast<bfloat16_t*>(to.mutable_data_ptr());
  at::parallel_for(0, q.numel(), quantize_fp8::kGrain, [&](int64_t begin, int64_t end) {
    quantize_fp8::widen_numbers(source + begin, target + begin, end - begin);
  });
  return to;
}

at::Tensor run_cpu(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                   const at::Tensor& b_scale, const at::Tensor& expert_offsets,
                   at::ScalarType dtype) {
  check(a, a_scale, b, b_scale, expert_offsets, dtype);
  const at::Tensor offsets = expert_offsets.contiguous();
  const int32_t* begin = offsets.const_data_ptr<int32_t>();
  const int64_t num_experts = b.size(0), n = b.size(1), k = a.size(1), blocks = scale_blocks(k);
  check_expert_offsets(kOp, begin, num_experts, a.size(0));
  const std::vector<int64_t> boundaries(begin, begin + num_experts + 1);
  const at::Tensor left = widened(a), right = b.contiguous();
  const at::Tensor left_scale = a_scale.contiguous(), right_scale = b_scale.contiguous();
  const at::Tensor out = at::empty({a.size(0), n}, a.options().dtype(dtype));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = n * out.element_size(), used = boundaries.back() * row_bytes;
  if (out.numel() > 0) std::memset(to + used, 0, out.nbytes() - used);  // rows of no expert
  const auto tasks = plan_tasks(boundaries, ceil_div(n, kPanelColumns), k);
  for_each_task(tasks, scaled_scratch_for(tasks, k), [&](const PlannedTask& p, void* scratch) {
    ScaledTask task;
    task.product = {
        .a = {.data = static_cast<const bfloat16_t*>(left.const_data_ptr()) + p.row * k, .ld = k},
        .b = {.data = static_cast<const float8_e4m3_t*>(right.const_data_ptr()) + p.expert * n * k,
              .ld = k},
        .rows = p.rows,
        .first_panel = p.first_panel,
        .end_panel = p.end_panel,
        .columns = n,
        .depth = k,
        .dtype = DType::kBFloat16};
    task.a_scale = {.data = left_scale.const_data_ptr<float>() + p.row * blocks, .ld = blocks};
    task.b_scale = right_scale.const_data_ptr<float>() + p.expert * scale_blocks(n) * blocks;
    multiply(task, to + p.row * row_bytes, dtype_of(out), scratch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("grouped_matmul_fp8", run_cpu); }

}  // namespace mergeme::grouped_matmul_fp8
