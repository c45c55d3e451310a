#include "csrc/ops/grouped_matmul/checks.h"
#include "csrc/ops/grouped_matmul/cpu_loops.h"

namespace mergeme::grouped_matmul {
namespace {

const char* address(const at::Tensor& t, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) + element * t.element_size();
}

// A block of V values by W values keeps its sums in second-level cache; in nt the rows of a are V,
// because turning them (not the weights) into panels costs one transposition.
constexpr int64_t kRowsNt = 128, kColumnsNt = kMaxBlockSums / kRowsNt;
constexpr int64_t kRows = 192, kColumns = kMaxBlockV;
static_assert(kRows * kColumns <= kMaxBlockSums);

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
  for (int64_t e = 0; e <= num_experts; ++e) {
    tokens[e] = offsets.const_data_ptr<int32_t>()[e];
    rows[e] = kLayout == Layout::kTn ? e * k : tokens[e];  // rows of out, expert after expert
  }
  constexpr bool kNt = kLayout == Layout::kNt;
  const auto blocks = plan_blocks(rows, n, kNt ? kRowsNt : kRows, kNt ? kColumnsNt : kColumns);
  for_each_block(blocks, [&](const PlannedBlock& p, void* scratch) {
    GroupedBlock block{.a = nullptr,
                       .b = nullptr,
                       .out = out_ptr + (p.row * n + p.column) * out.element_size(),
                       .rows = p.rows,
                       .columns = p.columns,
                       .depth = k,
                       .lda = k,
                       .ldb = kNt ? k : n,
                       .ldo = n,
                       .dtype = dtype_of(a)};
    if constexpr (kLayout == Layout::kNt) {
      block.a = address(left, p.row * k);
      block.b = address(right, (p.expert * n + p.column) * k);
      MERGEME_CALL_LOOPS(multiply_nt, block, scratch);
    } else if constexpr (kLayout == Layout::kNn) {
      block.a = address(left, p.row * k);
      block.b = address(right, p.expert * k * n + p.column);
      MERGEME_CALL_LOOPS(multiply_nn, block, scratch);
    } else {
      block.depth = tokens[p.expert + 1] - tokens[p.expert];
      block.a = address(left, tokens[p.expert] * k + (p.row - rows[p.expert]));
      block.b = address(right, tokens[p.expert] * n + p.column);
      MERGEME_CALL_LOOPS(multiply_tn, block, scratch);
    }
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
