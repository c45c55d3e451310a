#pragma once
#include <cmath>

#include "csrc/common/grouped_tile.cuh"
#include "csrc/ops/grouped_experts/params.h"

namespace mergeme::grouped_experts {

// Tiles of [S, columns] results for blocks of height x width.
MERGEME_HD grouped::TileGrid tile_grid(const Params& p, int64_t columns, int64_t height,
                                       int64_t width) {
  return {grouped::num_row_tiles(p.num_tokens * p.top_k, p.num_experts, height),
          ceil_div(columns, width)};
}

struct Tile {
  int64_t expert;
  int64_t row;     // first row of the sorted order
  int64_t end;     // the expert's end; the tile is empty if row >= end
  int64_t column;  // first column
};

__device__ __forceinline__ Tile find_tile(const Params& p, int64_t columns, int64_t number,
                                          int64_t height, int64_t width) {
  const auto grid = tile_grid(p, columns, height, width);
  if (number >= grid.count()) return {};
  int64_t row_tile, column_tile;
  grid.locate(number, row_tile, column_tile);
  const auto rows = grouped::find_row_tile(p.expert_offsets, p.num_experts, p.num_tokens * p.top_k,
                                           height, row_tile);
  return {rows.expert, rows.row, rows.end, column_tile * width};
}

// silu(gate) * up.
template <typename Acc>
__device__ __forceinline__ Acc swiglu(Acc gate, Acc up) {
  return gate / (Acc{1} + exp(-gate)) * up;
}

// The token behind a row of the sorted order.
__device__ __forceinline__ int64_t token_of_row(const Params& p, int64_t row) {
  const int64_t slot = p.permutation[row];
  MERGEME_DEVICE_ASSERT(0 <= slot && slot < p.num_tokens * p.top_k);
  return slot / p.top_k;
}

template <typename T>
struct GateUpShared {
  grouped::TileShared<acc_t<T>> tile;
  const T* rows[grouped::kTile];  // the tokens of the tile's rows, null past the expert's end
};

// activation[s, i] = swiglu(gate_e[i] . x[token of s], up_e[i] . x[token of s]). A block owns 64
// rows by 32 columns: its first 32 products are with gate rows, the other 32 with the same columns'
// up rows, and both of a pair belong to one thread.
template <typename T>
__global__ void __launch_bounds__(grouped::kTileThreads) gate_up_kernel(Params p) {
  using Acc = acc_t<T>;
  using grouped::kTile;
  constexpr int kWidth = kTile / 2;
  auto& shared = *simt::dynamic_shared<GateUpShared<T>>();
  const T* x = static_cast<const T*>(p.x);
  const int64_t num_slots = p.num_tokens * p.top_k, number = grouped::block_number();
  if (number == 0) grouped::check_expert_offsets(p.expert_offsets, p.num_experts, num_slots);
  const auto tile = find_tile(p, p.intermediate, number, kTile, kWidth);
  if (tile.row >= tile.end) return;  // the same for all threads of the block
  const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
  const int columns = grouped::clamp_left(p.intermediate - tile.column, kWidth);
  static_assert(kTile == grouped::kTileThreads);
  const int own = threadIdx.x;
  shared.rows[own] = own < rows ? x + token_of_row(p, tile.row + own) * p.hidden : nullptr;
  __syncthreads();
  const T* gate = static_cast<const T*>(p.gate_up) +
                  (tile.expert * 2 * p.intermediate + tile.column) * p.hidden;
  const T* up = gate + p.intermediate * p.hidden;
  Acc sum[8][8];
  grouped::multiply_tile<true, true>(
      shared.tile, p.hidden,
      [&](int i, int64_t k) {
        const T* row = shared.rows[i];
        return row ? to_acc(row[k]) : Acc{0};
      },
      [&](int j, int64_t k) {
        const T* from = j < kWidth ? gate : up;
        return j % kWidth < columns ? to_acc(from[j % kWidth * p.hidden + k]) : Acc{0};
      },
      sum);
  T* activation = static_cast<T*>(p.activation) + tile.row * p.intermediate + tile.column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = grouped::tile_index(threadIdx.x / 8, i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = grouped::tile_index(threadIdx.x % 8, j);
      if (row < rows && column < columns)
        activation[row * p.intermediate + column] = from_acc<T>(swiglu(sum[i][j], sum[i][j + 4]));
    }
  }
}

// expert_out[s, h] = down_e[h] . activation[s], kept in the accumulation type. A block owns one
// tile of results.
template <typename T>
__global__ void __launch_bounds__(grouped::kTileThreads) down_kernel(Params p) {
  using Acc = acc_t<T>;
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<grouped::TileShared<Acc>>();
  const auto tile = find_tile(p, p.hidden, grouped::block_number(), kTile, kTile);
  if (tile.row >= tile.end) return;  // the same for all threads of the block
  const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
  const int columns = grouped::clamp_left(p.hidden - tile.column, kTile);
  const T* a = static_cast<const T*>(p.activation) + tile.row * p.intermediate;
  const T* b =
      static_cast<const T*>(p.down) + (tile.expert * p.hidden + tile.column) * p.intermediate;
  Acc sum[8][8];
  grouped::multiply_tile<true, true>(
      shared, p.intermediate,
      [&](int i, int64_t k) { return i < rows ? to_acc(a[i * p.intermediate + k]) : Acc{0}; },
      [&](int j, int64_t k) { return j < columns ? to_acc(b[j * p.intermediate + k]) : Acc{0}; },
      sum);
  grouped::store_tile(sum, static_cast<Acc*>(p.expert_out) + tile.row * p.hidden + tile.column,
                      p.hidden, rows, columns);
}

inline constexpr int kCombineThreads = 256;

// out[t, h] = sum over k in order of topk_weights[t, k] * expert_out[inverse[t * K + k], h]; one
// block per token at a time, a thread owns every 256th h.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(Params p) {
  using Acc = acc_t<T>;
  const Acc* expert_out = static_cast<const Acc*>(p.expert_out);
  const Acc* weights = static_cast<const Acc*>(p.topk_weights);
  T* out = static_cast<T*>(p.out);
  const int64_t num_slots = p.num_tokens * p.top_k;
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    bool inside = true;
    for (int64_t k = 0; k < p.top_k; ++k) {
      const int64_t row = p.inverse[t * p.top_k + k];
      inside = inside && 0 <= row && row < num_slots;
    }
    MERGEME_DEVICE_ASSERT(inside);  // rows of inverse; once a token, so that the sums run free
    for (int64_t h = threadIdx.x; h < p.hidden; h += blockDim.x) {
      Acc sum = 0;
      for (int64_t k = 0; k < p.top_k; ++k)
        sum = simt::fma(weights[t * p.top_k + k],
                        expert_out[p.inverse[t * p.top_k + k] * p.hidden + h], sum);
      out[t * p.hidden + h] = from_acc<T>(sum);
    }
  }
}

}  // namespace mergeme::grouped_experts
