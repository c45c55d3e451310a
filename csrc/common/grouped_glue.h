// What the torch-facing files of the grouped ops share: checks of the group boundaries and the
// split of a grouped product into blocks for the CPU.
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

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
  TORCH_CHECK_VALUE(offsets[num_experts] == rows, op, ": expected expert_offsets to end at ", rows,
                    ", got ", offsets[num_experts]);
}

struct PlannedBlock {
  int64_t expert;
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
};

// Cuts `total` into equal parts of at most `most`, rounded up to multiples of `quantum`.
inline int64_t even_part(int64_t total, int64_t most, int64_t quantum) {
  const int64_t part = ceil_div(total, std::max<int64_t>(1, ceil_div(total, most)));
  return std::clamp<int64_t>(ceil_div(part, quantum) * quantum, 1, most);
}

// Blocks of every expert's [rows, columns] product. Only their number depends on the number of
// threads, and no result depends on it: see grouped_loops.h.
inline std::vector<PlannedBlock> plan_blocks(const std::vector<int64_t>& boundaries,
                                             int64_t columns, int64_t max_rows,
                                             int64_t max_columns) {
  const auto num_experts = static_cast<int64_t>(boundaries.size()) - 1;
  int64_t row_blocks = 0;
  for (int64_t e = 0; e < num_experts; ++e)
    row_blocks += ceil_div(boundaries[e + 1] - boundaries[e], max_rows);
  if (row_blocks == 0 || columns == 0) return {};
  // Four blocks per thread keep all busy when experts differ in size.
  const int64_t wanted = ceil_div(4 * at::get_num_threads(), row_blocks);
  const int64_t most = std::min(max_columns, std::max<int64_t>(96, columns / wanted));
  const int64_t width = even_part(columns, most, std::min<int64_t>(32, most));
  std::vector<PlannedBlock> blocks;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = boundaries[e], end = boundaries[e + 1];
    const int64_t height = even_part(end - begin, max_rows, std::min<int64_t>(16, max_rows));
    for (int64_t column = 0; column < columns; column += width)
      for (int64_t row = begin; row < end; row += height)
        blocks.push_back(
            {e, row, std::min(height, end - row), column, std::min(width, columns - column)});
  }
  return blocks;
}

// Calls run(block, scratch) for all blocks, each thread taking the next one when it is free.
template <typename Run>
void for_each_block(const std::vector<PlannedBlock>& blocks, Run run) {
  const auto count = static_cast<int64_t>(blocks.size());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const at::Tensor scratch = at::empty({kBlockScratchBytes}, at::kByte);
    for (int64_t i; (i = next.fetch_add(1)) < count;) run(blocks[i], scratch.mutable_data_ptr());
  });
}

}  // namespace mergeme
