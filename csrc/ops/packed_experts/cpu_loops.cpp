#include "csrc/ops/packed_experts/cpu_loops.h"

#include "csrc/common/grouped_panels.h"

namespace mergeme::packed_experts {
namespace {

// Where step k of a panel's column lies: 2-byte elements keep two steps of a column side by side.
template <typename Bits>
MERGEME_INLINE int64_t place(int64_t k, int64_t column) {
  return sizeof(Bits) == 2 ? k / 2 * 2 * kPanelColumns + 2 * column + k % 2
                           : k * kPanelColumns + column;
}

template <typename Bits>
MERGEME_INLINE Bits* panel_of(const PackTask& task, int64_t panel) {
  return static_cast<Bits*>(task.packed) +
         panel * round_up(task.depth, kPackedDepth) * kPanelColumns;
}

// Rows that are contiguous along k move as 32-bit words: elements, or pairs of them.
template <typename Bits>
void pack_rows(const PackTask& task, int64_t panel) {
  constexpr int64_t kPerWord = 4 / sizeof(Bits);
  Bits* out = panel_of<Bits>(task, panel);
  const int64_t words = task.depth / kPerWord;
  for (int64_t j = 0; j < kPanelColumns; j += kLanes<float>)
    transpose_rows<float>(
        [&](int64_t i) -> const float* {
          const int64_t row = task.columns.row_of(panel, j + i, task.rows);
          return row < 0 ? nullptr
                         : reinterpret_cast<const float*>(static_cast<const Bits*>(task.weight) +
                                                          row * task.row_stride);
        },
        words, reinterpret_cast<float*>(out) + j, kPanelColumns);
  for (int64_t k = words * kPerWord; k < task.depth; ++k)  // an odd step is left
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      const int64_t row = task.columns.row_of(panel, j, task.rows);
      const Bits* weight = static_cast<const Bits*>(task.weight);
      out[place<Bits>(k, j)] = row < 0 ? Bits{0} : weight[row * task.row_stride + k];
    }
}

template <typename Bits>
void pack_columns(const PackTask& task, int64_t panel) {
  Bits* out = panel_of<Bits>(task, panel);
  int64_t rows[kPanelColumns];
  for (int64_t j = 0; j < kPanelColumns; ++j) rows[j] = task.columns.row_of(panel, j, task.rows);
  for (int64_t k = 0; k < task.depth; ++k) {
    const Bits* from = static_cast<const Bits*>(task.weight) + k * task.k_stride;
    for (int64_t j = 0; j < kPanelColumns; ++j)
      out[place<Bits>(k, j)] = rows[j] < 0 ? Bits{0} : from[rows[j] * task.row_stride];
  }
}

template <typename Bits>
void pack_panels(const PackTask& task, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    if (task.k_stride == 1)
      pack_rows<Bits>(task, panel);
    else
      pack_columns<Bits>(task, panel);
    Bits* out = panel_of<Bits>(task, panel);
    for (int64_t k = task.depth; k < round_up(task.depth, kPackedDepth); ++k)
      for (int64_t j = 0; j < kPanelColumns; ++j) out[place<Bits>(k, j)] = 0;
  }
}

template <typename Bits>
void unpack_panels(const PackTask& task, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const Bits* from = panel_of<Bits>(task, panel);
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      const int64_t row = task.columns.row_of(panel, j, task.rows);
      if (row < 0) continue;
      Bits* to = static_cast<Bits*>(task.weight) + row * task.row_stride;
      for (int64_t k = 0; k < task.depth; ++k) to[k * task.k_stride] = from[place<Bits>(k, j)];
    }
  }
}

}  // namespace

namespace MERGEME_ISA {

void pack(const PackTask& task, int64_t begin, int64_t end) {
  if (task.element_size == 2)
    pack_panels<uint16_t>(task, begin, end);
  else
    pack_panels<uint32_t>(task, begin, end);
}

void unpack(const PackTask& task, int64_t begin, int64_t end) {
  if (task.element_size == 2)
    unpack_panels<uint16_t>(task, begin, end);
  else
    unpack_panels<uint32_t>(task, begin, end);
}

}  // namespace MERGEME_ISA
}  // namespace mergeme::packed_experts
