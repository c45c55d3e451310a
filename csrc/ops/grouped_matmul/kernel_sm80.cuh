#pragma once
#include "csrc/common/grouped_tile_sm80.cuh"
#include "csrc/ops/grouped_matmul/kernel.cuh"

namespace mergeme::grouped_matmul {

// Whether every 16-byte chunk that the tensor-core kernel copies is aligned and lies in one row.
inline bool fits_sm80(const Params& p) {
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && is_aligned(p.out) &&
         is_aligned(p.a) && is_aligned(p.b) && p.a_columns % 8 == 0 &&
         p.a_columns <= grouped::sm80::kMaxDepth &&
         (p.layout == Layout::kNt || p.out_columns % 8 == 0);
}

// The contract of grouped_matmul_kernel for float16 and bfloat16 on tensor cores. A block owns one
// kRows x 128 tile of results at a time; every result belongs to one tile, so plain stores do.
template <typename T, Layout kLayout, int kRows>
__global__ void __launch_bounds__(grouped::sm80::kThreads, grouped::sm80::kBlocksPerSm)
    grouped_matmul_sm80_kernel(Params p) {
  using namespace grouped::sm80;
  using Shape = Shape<kRows>;
  char* shared = simt::dynamic_shared<char>();
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  T* out = static_cast<T*>(p.out);
  if constexpr (kLayout == Layout::kTn) {
    using Operand = EvenSteps<T, Shape::kDepth>;
    const int64_t n1 = p.a_columns, n2 = p.out_columns;
    grouped::for_each_sum_tile(
        p.expert_offsets, p.grid, kRows, kColumns, [&](const grouped::SumTile& tile) {
          multiply_sums<Shape>(
              shared, tile, out, n1, n2,
              [&](int depth, int rows) {
                return Operand(depth, a + tile.begin * n1 + tile.row, n1, rows);
              },
              [&](int depth, int columns) {
                return Operand(depth, b + tile.begin * n2 + tile.column, n2, columns);
              });
        });
  } else {
    grouped::for_each_row_tile(p.plan, p.grid, kRows, kColumns, [&](const grouped::Tile& tile) {
      multiply_rows<Shape, kLayout == Layout::kNt>(shared, tile, a, b, out, p.a_columns,
                                                   p.out_columns, p.num_experts);
    });
  }
}

}  // namespace mergeme::grouped_matmul
