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
// 128 x 128 tile of results; every result belongs to one tile, so plain stores do.
template <typename T, Layout kLayout>
__global__ void __launch_bounds__(grouped::sm80::kThreads) grouped_matmul_sm80_kernel(Params p) {
  using namespace grouped::sm80;
  char* shared = simt::dynamic_shared<char>();
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const int64_t number = grouped::block_number();
  if (number == 0) grouped::check_expert_offsets(p.expert_offsets, p.num_experts, p.num_tokens);
  const Tile tile = find_tile<kLayout>(p, tile_grid(p, kSide, kSide), number, kSide, kSide);
  if (tile.row >= tile.end) return;  // the same for all threads of the block
  const int rows = grouped::clamp_left(tile.end - tile.row, kSide);
  const int columns = grouped::clamp_left(p.out_columns - tile.column, kSide);
  const int depth = static_cast<int>(tile.depth);
  float sum[4][8][4];
  if constexpr (kLayout == Layout::kTn) {
    DepthLast<T> left(depth, a + tile.token * p.a_columns + tile.row, p.a_columns, rows);
    DepthLast<T> right(depth, b + tile.token * p.out_columns + tile.column, p.out_columns, columns);
    multiply_tile<T>(shared, depth, left, right, sum);
  } else {
    const int64_t k = p.a_columns;
    const int row = threadIdx.x / 4;
    EvenRows<T> left(depth, a + (tile.row + (row < rows ? row : 0)) * k, 32 * k,
                     rows_of_thread(rows));
    if constexpr (kLayout == Layout::kNt) {
      const int64_t column = tile.expert * p.out_columns + tile.column;
      EvenRows<T> right(depth, b + (column + (row < columns ? row : 0)) * k, 32 * k,
                        rows_of_thread(columns));
      multiply_tile<T>(shared, depth, left, right, sum);
    } else {
      DepthLast<T> right(depth, b + tile.expert * k * p.out_columns + tile.column, p.out_columns,
                         columns);
      multiply_tile<T>(shared, depth, left, right, sum);
    }
  }
  const int64_t first = kLayout == Layout::kTn ? tile.expert * p.a_columns + tile.row : tile.row;
  T* out = static_cast<T*>(p.out) + first * p.out_columns + tile.column;
  store_tile(shared, sum, out, p.out_columns, rows, columns);
}

}  // namespace mergeme::grouped_matmul
