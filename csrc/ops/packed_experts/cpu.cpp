#include <cstring>

#include "csrc/ops/grouped_experts/cpu_forward.h"
#include "csrc/ops/grouped_matmul/cpu_matrix.h"
#include "csrc/ops/packed_experts/checks.h"
#include "csrc/ops/packed_experts/cpu_loops.h"

namespace mergeme::packed_experts {
namespace {

using grouped_experts::const_element;
using grouped_experts::element;

// Calls loop(task, begin, end) for all panels of all experts.
template <typename Loop>
void for_each_expert(const at::Tensor& weight, const at::Tensor& packed, bool gated,
                     bool interleaved, bool transposed, Loop loop) {
  const int64_t n = weight.size(transposed ? 2 : 1), depth = weight.size(transposed ? 1 : 2);
  PanelColumns columns;
  if (gated && interleaved) columns = {.gated_up = 1, .gated_step = 2};
  if (gated && !interleaved) columns = {.gated_up = n / 2, .gated_step = 1};
  const int64_t panels = packed.size(1), total = weight.size(0) * panels;
  at::parallel_for(0, total, 8, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t e = begin / panels, first = begin % panels;
      const int64_t count = std::min(end - begin, panels - first);
      loop({.weight = const_cast<char*>(const_element(weight, e * n * depth)),
            .packed = const_cast<char*>(const_element(packed, e * packed.stride(0))),
            .rows = gated ? n / 2 : n,
            .depth = depth,
            .row_stride = transposed ? 1 : depth,
            .k_stride = transposed ? n : 1,
            .columns = columns,
            .element_size = weight.element_size()},
           first, first + count);
      begin += count;
    }
  });
}

at::Tensor pack_cpu(const at::Tensor& weight, bool gated, bool interleaved, bool transposed) {
  check_packable(kPack, "weight", weight);
  check_dim(kPack, "weight", weight, 3, transposed ? "[E, K, N]" : "[E, N, K]");
  const int64_t n = weight.size(transposed ? 2 : 1), depth = weight.size(transposed ? 1 : 2);
  check_layout(kPack, n, gated, interleaved);
  const at::Tensor from = weight.contiguous();
  const int64_t filled_up = ceil_div(depth, kPackedDepth) * kPackedDepth;
  const at::Tensor packed =
      workspace(packed_sizes(weight.size(0), n, filled_up, gated), weight.options())
          .narrow(2, 0, depth);
  for_each_expert(from, packed, gated, interleaved, transposed,
                  [](const PackTask& task, int64_t begin, int64_t end) {
                    MERGEME_CALL_LOOPS(pack, task, begin, end);
                  });
  return packed;
}

at::Tensor unpack_cpu(const at::Tensor& packed, int64_t rows, int64_t depth, bool gated,
                      bool interleaved, bool transposed) {
  check_packable(kUnpack, "packed", packed);
  check_layout(kUnpack, rows, gated, interleaved);
  check_dim(kUnpack, "packed", packed, 4, "[E, panels, K, 32]");
  check_packed(kUnpack, "packed", packed, packed.size(0), rows, depth, gated);
  const std::vector<int64_t> sizes = {packed.size(0), transposed ? depth : rows,
                                      transposed ? rows : depth};
  const at::Tensor weight = at::empty(sizes, packed.options());
  for_each_expert(weight, packed, gated, interleaved, transposed,
                  [](const PackTask& task, int64_t begin, int64_t end) {
                    MERGEME_CALL_LOOPS(unpack, task, begin, end);
                  });
  return weight;
}

at::Tensor experts_cpu(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                       const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                       const at::Tensor& permutation, const at::Tensor& inverse,
                       int64_t intermediate, std::string_view activation) {
  check_packable(kExperts, "x", x);
  check_dtype(kExperts, "gate_up", gate_up, x.scalar_type());
  check_dtype(kExperts, "down", down, x.scalar_type());
  check_dim(kExperts, "x", x, 2, "[T, H]");
  check_dim(kExperts, "expert_offsets", expert_offsets, 1, "[E + 1]");
  TORCH_CHECK_VALUE(expert_offsets.numel() >= 2, kExperts,
                    ": expected expert_offsets of shape [E + 1] with E >= 1, got ",
                    expert_offsets.sizes());
  TORCH_CHECK_VALUE(intermediate >= 0, kExperts, ": expected intermediate of at least 0, got ",
                    intermediate);
  const int64_t experts = expert_offsets.numel() - 1, hidden = x.size(1);
  check_packed(kExperts, "gate_up", gate_up, experts, 2 * intermediate, hidden, true);
  check_packed(kExperts, "down", down, experts, hidden, intermediate, false);
  grouped_experts::check_routing(kExperts, x, topk_weights, expert_offsets, permutation, inverse,
                                 experts);
  const auto kind = grouped_experts::activation_of(kExperts, activation);
  const grouped_experts::Routing routing(kExperts, topk_weights, expert_offsets, permutation,
                                         inverse);
  const at::Tensor out = at::empty(x.sizes(), x.options());
  grouped_experts::forward(x.contiguous(), {gate_up, down, intermediate, true}, routing, kind, out,
                           at::empty({0, 2 * intermediate}, x.options()));
  return out;
}

at::Tensor matmul_cpu(const at::Tensor& a, const at::Tensor& packed,
                      const at::Tensor& expert_offsets, int64_t columns) {
  check_packable(kMatmul, "a", a);
  check_dtype(kMatmul, "packed", packed, a.scalar_type());
  check_dtype(kMatmul, "expert_offsets", expert_offsets, at::kInt);
  check_dim(kMatmul, "a", a, 2, "[M, K]");
  check_dim(kMatmul, "expert_offsets", expert_offsets, 1, "[E + 1]");
  check_num_rows(kMatmul, "a", a.size(0));
  TORCH_CHECK_VALUE(expert_offsets.numel() >= 2, kMatmul,
                    ": expected expert_offsets of shape [E + 1] with E >= 1, got ",
                    expert_offsets.sizes());
  TORCH_CHECK_VALUE(columns >= 0, kMatmul, ": expected columns of at least 0, got ", columns);
  const int64_t experts = expert_offsets.numel() - 1, depth = a.size(1);
  check_packed(kMatmul, "packed", packed, experts, columns, depth, false);
  const at::Tensor left = a.contiguous(), offsets = expert_offsets.contiguous();
  const int32_t* begin = offsets.const_data_ptr<int32_t>();
  check_expert_offsets(kMatmul, begin, experts, a.size(0));
  const std::vector<int64_t> boundaries(begin, begin + experts + 1);
  const at::Tensor out = at::empty({a.size(0), columns}, a.options());
  const int64_t used = boundaries.back() * columns * out.element_size();
  if (out.numel() > 0)
    std::memset(static_cast<char*>(out.mutable_data_ptr()) + used, 0, out.nbytes() - used);
  const auto tasks = plan_tasks(boundaries, packed.size(1), depth);
  for_each_task(tasks, scratch_for(tasks, depth, a), [&](const PlannedTask& p, void* scratch) {
    const PanelTask task{.a = {.data = const_element(left, p.row * depth), .ld = depth},
                         .packed = const_element(packed, p.expert * packed.stride(0)),
                         .rows = p.rows,
                         .first_panel = p.first_panel,
                         .end_panel = p.end_panel,
                         .columns = columns,
                         .depth = depth,
                         .dtype = dtype_of(a)};
    grouped_matmul::multiply(task, element(out, p.row * columns), columns, false, scratch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) {
  m.impl("pack_experts", pack_cpu);
  m.impl("unpack_experts", unpack_cpu);
  m.impl("packed_experts", experts_cpu);
  m.impl("packed_matmul", matmul_cpu);
}

}  // namespace mergeme::packed_experts
