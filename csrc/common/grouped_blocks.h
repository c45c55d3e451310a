// How the CPU half cuts grouped products into tasks: what planner and loops share. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme {

// Columns of B in a panel; two vectors of the widest instruction set, an AMX tile pair.
inline constexpr int64_t kPanelColumns = 32;
// Panels that are widened together, and the depth to which they are: one takes 32 KB of first-level
// cache in float32, all of them 256 KB of the second.
inline constexpr int64_t kPanelGroup = 8;
inline constexpr int64_t kPanelDepth = 256;
// Packed panels are filled up with zeros to a multiple of this depth (one AMX tile).
inline constexpr int64_t kPackedDepth = 32;
// Up to so many blocks of rows, packed 16-bit weights are widened again for each: that takes less
// than writing them to memory and reading them back.
inline constexpr int64_t kDirectBlocks = 3;
// Words ahead that packed weights are asked for.
inline constexpr int64_t kPrefetchWords = 512;
inline constexpr int64_t kMaxVectorBytes = 64;
// No instruction set gives a block of rows more room than this.
inline constexpr int64_t kMostRowStride = 16;

// Which row of the weights a panel's column is: the column itself, or, with gate and up side by
// side, 16 columns of gate and the same 16 of up.
struct PanelColumns {
  int64_t gated_up = 0;    // rows from a gate row to its up row; 0 if not gated
  int64_t gated_step = 1;  // rows from one gate row to the next
  // The row, or -1 past the last of `columns` (of the gate's, if gated).
  MERGEME_HD int64_t row_of(int64_t panel, int64_t column, int64_t columns) const {
    if (gated_up == 0) {
      const int64_t row = panel * kPanelColumns + column;
      return row < columns ? row : -1;
    }
    constexpr int64_t kHalf = kPanelColumns / 2;
    const int64_t row = panel * kHalf + column % kHalf;
    return row < columns ? row * gated_step + (column < kHalf ? 0 : gated_up) : -1;
  }
};

// Rows in memory, in the order of an index if there is one: row i is data + (index[i] / divisor) *
// ld. They run along the depth of the product, or across it: then row k holds step k.
struct Operand {
  const void* data = nullptr;
  int64_t ld = 0;
  const int32_t* index = nullptr;
  int64_t divisor = 1;
  bool across = false;
  PanelColumns columns = {};
  template <typename T>
  MERGEME_HD const T* row(int64_t i) const {
    return static_cast<const T*>(data) + (index ? index[i] / divisor : i) * ld;
  }
};

// Rows [first_row, first_row + rows) of A times panels [first_panel, end_panel) of B, for one
// group.
struct PanelTask {
  Operand a = {};
  Operand b = {};                // B, unless packed
  const void* packed = nullptr;  // the group's packed panels
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_panel = 0;
  int64_t end_panel = 0;
  int64_t columns = 0;  // of the whole product (of gate, if gated)
  int64_t depth = 0;
  DType dtype = DType::kFloat32;
};

// A product of e4m3 operands: for each block of 128 steps of the depth its sum, in float32, times
// the row's and the column's scale of that block.
struct ScaledTask {
  PanelTask product;  // a: bfloat16 that holds e4m3 numbers; b: e4m3, its rows along the depth
  Operand a_scale;    // float32 rows [blocks of the depth], found as a's rows are
  const float* b_scale = nullptr;  // the group's, [blocks of rows, blocks of the depth]
  int64_t up_scale = 0;            // gated: the block of rows where those of up begin
};

// Bytes of scratch for tasks of at most `rows` rows, whatever the element type and instruction set.
inline int64_t panel_scratch_bytes(int64_t rows, int64_t depth, int64_t acc_bytes) {
  const int64_t lanes = rows * 4 / 3 + kMostRowStride;  // 16 for 14 rows, or 8 for 6
  const int64_t columns = kPanelGroup * kPanelColumns;
  return acc_bytes * (lanes * (depth + kPackedDepth) + (rows + kMostRowStride) * columns +
                      columns * kPanelDepth) +
         4 * kMaxVectorBytes;
}
// The same for scaled tasks: a pointer to each row's scales, and one block's sums.
inline int64_t scaled_scratch_bytes(int64_t rows, int64_t depth) {
  constexpr int64_t kMostRows = 32;  // of a block
  return panel_scratch_bytes(rows, depth, 4) + (rows + kMostRows) * int64_t{sizeof(float*)} +
         kMostRows * kPanelColumns * int64_t{sizeof(float)};
}

}  // namespace mergeme
