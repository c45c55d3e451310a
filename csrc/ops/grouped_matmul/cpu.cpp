#include <cstring>

#include "csrc/ops/grouped_matmul/checks.h"
#include "csrc/ops/grouped_matmul/cpu_matrix.h"

namespace mergeme::grouped_matmul {
namespace {

const char* address(const at::Tensor& t, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) + element * t.element_size();
}

template <Layout kLayout>
at::Tensor run_cpu(const at::Tensor& a, const at::Tensor& b, const at::Tensor& expert_offsets) {
  check(kLayout, a, b, expert_offsets);
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  const at::Tensor offsets = expert_offsets.contiguous();
  const int64_t num_experts = offsets.numel() - 1;
  check_expert_offsets(op_name(kLayout), offsets.const_data_ptr<int32_t>(), num_experts, a.size(0));
  const at::Tensor out = at::empty(output_sizes(kLayout, a, b, offsets), a.options());
  char* out_ptr = static_cast<char*>(out.mutable_data_ptr());

  std::vector<int64_t> tokens(num_experts + 1), rows(num_experts + 1);
  const int64_t n = out.size(-1), k = a.size(1);
  int64_t depth = k;  // the deepest expert's
  if (kLayout == Layout::kTn) depth = 0;
  for (int64_t e = 0; e <= num_experts; ++e) {
    tokens[e] = offsets.const_data_ptr<int32_t>()[e];
    rows[e] = kLayout == Layout::kTn ? e * k : tokens[e];  // rows of out, expert after expert
    if (kLayout == Layout::kTn && e > 0) depth = std::max(depth, tokens[e] - tokens[e - 1]);
  }
  if constexpr (kLayout != Layout::kTn) {  // rows of no expert
    const int64_t used = tokens[num_experts] * n * out.element_size();
    std::memset(out_ptr + used, 0, out.nbytes() - used);
  }
  const auto tasks = plan_tasks(rows, ceil_div(n, kPanelColumns), depth);
  for_each_task(tasks, scratch_for(tasks, depth, a), [&](const PlannedTask& p, void* scratch) {
    PanelTask task{.rows = p.rows,
                   .first_panel = p.first_panel,
                   .end_panel = p.end_panel,
                   .columns = n,
                   .depth = k,
                   .dtype = dtype_of(a)};
    if constexpr (kLayout == Layout::kTn) {
      const int64_t first = tokens[p.expert];
      task.depth = tokens[p.expert + 1] - first;
      task.first_row = p.row - rows[p.expert];
      task.a = {.data = address(left, first * k), .ld = k, .across = true};
      task.b = {.data = address(right, first * n), .ld = n, .across = true};
    } else {
      constexpr bool kNt = kLayout == Layout::kNt;
      task.a = {.data = address(left, p.row * k), .ld = k};
      task.b = {.data = address(right, p.expert * n * k), .ld = kNt ? k : n, .across = !kNt};
    }
    multiply(task, out_ptr + p.row * n * out.element_size(), n, false, scratch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) {
  m.impl("grouped_matmul_nt", run_cpu<Layout::kNt>);
  m.impl("grouped_matmul_nn", run_cpu<Layout::kNn>);
  m.impl("grouped_matmul_tn", run_cpu<Layout::kTn>);
}

}  // namespace mergeme::grouped_matmul
