#pragma once
#include "csrc/common/grouped_tile_sm80.cuh"
#include "csrc/ops/grouped_experts/kernel.cuh"

namespace mergeme::grouped_experts {

// Whether every 16-byte chunk that the tensor-core kernels copy is aligned and lies in one row.
inline bool fits_sm80(const Params& p) {
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && is_aligned(p.x) &&
         is_aligned(p.gate_up) && is_aligned(p.down) && is_aligned(p.activation) &&
         is_aligned(p.expert_out) && p.hidden % 8 == 0 && p.intermediate % 8 == 0 &&
         p.hidden <= grouped::sm80::kMaxDepth && p.intermediate <= grouped::sm80::kMaxDepth;
}

// Columns of the activation in one tile: as many gate columns and as many up columns.
inline constexpr int kGateUpWidth = grouped::sm80::kSide / 2;

// The contract of gate_up_kernel on tensor cores. A block owns 128 rows by 64 columns. The tile's
// columns alternate, 8 gate then the same 8 up, so that a lane holds both of a pair.
template <typename T>
__global__ void __launch_bounds__(grouped::sm80::kThreads) gate_up_sm80_kernel(Params p) {
  using namespace grouped::sm80;
  char* shared = simt::dynamic_shared<char>();
  const T* x = static_cast<const T*>(p.x);
  const int64_t num_slots = p.num_tokens * p.top_k, number = grouped::block_number();
  if (number == 0) grouped::check_expert_offsets(p.expert_offsets, p.num_experts, num_slots);
  const auto tile = find_tile(p, p.intermediate, number, kSide, kGateUpWidth);
  if (tile.row >= tile.end) return;  // the same for all threads of the block
  const int rows = grouped::clamp_left(tile.end - tile.row, kSide);
  const int columns = grouped::clamp_left(p.intermediate - tile.column, kGateUpWidth);
  const int depth = static_cast<int>(p.hidden);
  AnyRows<T> left(depth, [&](int i) {
    return i < rows ? x + token_of_row(p, tile.row + i) * p.hidden : nullptr;
  });
  // Of the tile's columns this thread copies threadIdx.x / 4 and three more, 32 apart; those are 16
  // apart among gate or up rows.
  const int place = threadIdx.x / 4, column = place / 16 * 8 + place % 8;
  const int count = column < columns ? (columns - column + 15) / 16 : 0;
  const int64_t weight_row = tile.expert * 2 * p.intermediate + tile.column +
                             (place / 8 % 2 ? p.intermediate : 0) + (count > 0 ? column : 0);
  EvenRows<T> right(depth, static_cast<const T*>(p.gate_up) + weight_row * p.hidden, 16 * p.hidden,
                    count);
  float sum[4][8][4];
  multiply_tile<T>(shared, depth, left, right, sum);
  Staged<T, kGateUpWidth> staged(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; j += 2)
#pragma unroll
      for (int l = 0; l < 4; l += 2)
        staged.put(
            warp_row() + 16 * i + 4 * l + lane_row(), warp_column() / 2 + 4 * j + lane_column(),
            swiglu(sum[i][j][l], sum[i][j + 1][l]), swiglu(sum[i][j][l + 1], sum[i][j + 1][l + 1]));
  __syncthreads();
  staged.copy_out(static_cast<T*>(p.activation) + tile.row * p.intermediate + tile.column,
                  p.intermediate, rows, columns);
}

// The contract of down_kernel on tensor cores. A block owns a 128 x 128 tile.
template <typename T>
__global__ void __launch_bounds__(grouped::sm80::kThreads) down_sm80_kernel(Params p) {
  using namespace grouped::sm80;
  char* shared = simt::dynamic_shared<char>();
  const auto tile = find_tile(p, p.hidden, grouped::block_number(), kSide, kSide);
  if (tile.row >= tile.end) return;  // the same for all threads of the block
  const int rows = grouped::clamp_left(tile.end - tile.row, kSide);
  const int columns = grouped::clamp_left(p.hidden - tile.column, kSide);
  const int depth = static_cast<int>(p.intermediate), row = threadIdx.x / 4;
  const int64_t weight_row = tile.expert * p.hidden + tile.column + (row < columns ? row : 0);
  EvenRows<T> left(
      depth,
      static_cast<const T*>(p.activation) + (tile.row + (row < rows ? row : 0)) * p.intermediate,
      32 * p.intermediate, rows_of_thread(rows));
  EvenRows<T> right(depth, static_cast<const T*>(p.down) + weight_row * p.intermediate,
                    32 * p.intermediate, rows_of_thread(columns));
  float sum[4][8][4];
  multiply_tile<T>(shared, depth, left, right, sum);
  store_tile(shared, sum, static_cast<float*>(p.expert_out) + tile.row * p.hidden + tile.column,
             p.hidden, rows, columns);
}

}  // namespace mergeme::grouped_experts
