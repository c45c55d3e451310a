// What the torch-facing files of the grouped ops share: checks of the group boundaries and the
// split of a grouped product into blocks for the CPU.
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "csrc/common/grouped_blocks.h"
#include "csrc/common/torch_glue.h"

namespace mergeme {

// expert_offsets is int32, so it cannot name more rows than this.
inline void check_num_rows(const char* op, const char* arg, int64_t rows) {
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max(), op, ": expected ", arg,
                    " with at most 2147483647 rows, got ", rows);
}

// Reads every element: CPU only.
inline void check_expert_offsets(const char* op, const int32_t* offsets, int64_t num_experts,
                                 int64_t rows) {
  TORCH_CHECK_VALUE(offsets[0] == 0, op, ": expected expert_offsets to start at 0, got ",
                    offsets[0]);
  for (int64_t e = 0; e < num_experts; ++e)
    TORCH_CHECK_VALUE(offsets[e] <= offsets[e + 1], op,
                      ": expected expert_offsets to be non-decreasing, got ", offsets[e + 1],
                      " after ", offsets[e], " at position ", e + 1);
  TORCH_CHECK_VALUE(offsets[num_experts] <= rows, op,
                    ": expected expert_offsets to end at most at ", rows, ", got ",
                    offsets[num_experts]);
}

// Memory for results between two passes and for packed weights. Large pieces are given huge pages
// where the system has them: new memory then costs a third of the time to touch, and streaming
// through it fewer translations.
inline at::Tensor workspace(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor memory = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + memory.nbytes()) / kHugePage * kHugePage;
  // Only a hint: where it is refused nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return memory;
}

struct PlannedTask {
  int64_t expert;
  int64_t row;  // the task's first, in the order of all experts' rows
  int64_t rows;
  int64_t first_panel;
  int64_t end_panel;
};

// Cuts `total` into equal parts of at most `most`, rounded up to multiples of `quantum`.
inline int64_t even_part(int64_t total, int64_t most, int64_t quantum) {
  const int64_t part = ceil_div(total, std::max<int64_t>(1, ceil_div(total, most)));
  return std::max<int64_t>(1, std::min(most, ceil_div(part, quantum) * quantum));
}

// Tasks of every expert's product of `panels` panels, whose rows of the left operand are `depth`
// long. Only their number depends on the number of threads, and no result depends on it: see
// grouped_panels.h.
inline std::vector<PlannedTask> plan_tasks(const std::vector<int64_t>& boundaries, int64_t panels,
                                           int64_t depth) {
  const auto num_experts = static_cast<int64_t>(boundaries.size()) - 1;
  // The repacked rows of a task take some 8 MB: outer caches hold them between passes.
  const int64_t max_rows =
      std::clamp<int64_t>((8 << 20) / (4 * std::max<int64_t>(1, depth)), 112, 1024);
  int64_t row_parts = 0;
  for (int64_t e = 0; e < num_experts; ++e)
    row_parts += ceil_div(boundaries[e + 1] - boundaries[e], max_rows);
  if (row_parts == 0 || panels == 0) return {};
  // Four tasks per thread keep all busy when experts differ in size; one thread needs no split.
  const int64_t threads = at::get_num_threads();
  const int64_t splits = threads == 1 ? 1 : ceil_div(4 * threads, row_parts);
  const int64_t width = even_part(panels, std::max<int64_t>(2, ceil_div(panels, splits)), 2);
  std::vector<PlannedTask> tasks;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = boundaries[e], end = boundaries[e + 1];
    const int64_t height = even_part(end - begin, max_rows, 14);
    for (int64_t row = begin; row < end; row += height)
      for (int64_t p = 0; p < panels; p += width)
        tasks.push_back({e, row, std::min(height, end - row), p, std::min(p + width, panels)});
  }
  return tasks;
}

// Calls run(task, scratch) for all tasks, each thread taking the next one when it is free.
template <typename Run>
void for_each_task(const std::vector<PlannedTask>& tasks, int64_t scratch_bytes, Run run) {
  const auto count = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const at::Tensor scratch = workspace({scratch_bytes}, at::kByte);
    for (int64_t i; (i = next.fetch_add(1)) < count;) run(tasks[i], scratch.mutable_data_ptr());
  });
}

// The scratch that any of the tasks needs if rows of the left operand are `depth` long.
inline int64_t scratch_for(const std::vector<PlannedTask>& tasks, int64_t depth,
                           const at::Tensor& like) {
  int64_t rows = 0;
  for (const PlannedTask& task : tasks) rows = std::max(rows, task.rows);
  return panel_scratch_bytes(rows, depth, like.scalar_type() == at::kDouble ? 8 : 4);
}
inline int64_t scaled_scratch_for(const std::vector<PlannedTask>& tasks, int64_t depth) {
  int64_t rows = 0;
  for (const PlannedTask& task : tasks) rows = std::max(rows, task.rows);
  return scaled_scratch_bytes(rows, depth);
}

}  // namespace mergeme
