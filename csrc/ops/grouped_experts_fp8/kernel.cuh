#pragma once
#include "csrc/common/grouped_tile_fp8.cuh"
#include "csrc/ops/grouped_experts/kernel.cuh"
#include "csrc/ops/grouped_experts_fp8/params.h"

namespace mergeme::grouped_experts_fp8 {

// Rows of the quantised tokens, and of their scales.
struct GatherShared {
  grouped::TileShared<float> tile;
  int32_t tokens[grouped::kTile];  // -1 past the expert's end
};

// activation[s, i] = f(gate) * up with gate = gate_e[i] . x[token of s] and up = up_e[i] . x[token
// of s], products of blocks of 128 times their scales; zero for the rows of no expert. A block owns
// 64 rows by 32 columns at a time: its first 32 products are with gate rows, the other 32 with the
// same columns' up rows, and both of a pair belong to one thread.
__global__ void __launch_bounds__(grouped::kTileThreads) gate_up_fp8_kernel(Params p) {
  using grouped::kTile;
  constexpr int kWidth = kTile / 2;
  static_assert(kTile == grouped::kTileThreads && kScaleBlock % kWidth == 0);
  auto& shared = *simt::dynamic_shared<GatherShared>();
  const int64_t width = p.intermediate, depth_blocks = scale_blocks(p.hidden);
  grouped::for_each_row_tile(p.plan, p.grid, kTile, kWidth, [&](const grouped::Tile& tile) {
    const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
    const int columns = grouped::clamp_left(width - tile.column, kWidth);
    const bool owned = tile.group < p.num_experts;
    const int own = threadIdx.x;
    __syncthreads();  // the last tile's rows have been read
    shared.tokens[own] = owned && own < rows ? p.tokens[tile.row + own] : -1;
    __syncthreads();
    const int64_t expert = owned ? tile.group : 0, up_blocks = scale_blocks(width);
    const float8_e4m3_t* gate = p.gate_up + (expert * 2 * width + tile.column) * p.hidden;
    const float8_e4m3_t* up = gate + width * p.hidden;
    const float* gate_scale =
        p.gate_up_scale + (expert * 2 * up_blocks + tile.column / kScaleBlock) * depth_blocks;
    const float* up_scale = gate_scale + up_blocks * depth_blocks;
    float sum[8][8];
    grouped::multiply_scaled_tile(
        shared.tile, owned ? p.hidden : 0,
        [&](int i, int64_t k) {
          const int64_t token = shared.tokens[i];
          return token >= 0 ? to_acc(p.quantized[token * p.hidden + k]) : 0.f;
        },
        [&](int j, int64_t k) {
          const float8_e4m3_t* from = j < kWidth ? gate : up;
          return j % kWidth < columns ? to_acc(from[j % kWidth * p.hidden + k]) : 0.f;
        },
        [&](int i, int64_t block) {
          const int64_t token = shared.tokens[i];
          return token >= 0 ? p.quantized_scale[token * depth_blocks + block] : 0.f;
        },
        [&](int j, int64_t block) { return (j < kWidth ? gate_scale : up_scale)[block]; }, sum);
    float* out = p.activation + tile.row * width + tile.column;
    const grouped_experts::OwnSums<float> sums(sum);
    grouped_experts::dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const int row = grouped::tile_index(threadIdx.x / 8, i);
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          const int column = grouped::tile_index(threadIdx.x % 8, j);
          if (row >= rows || column >= columns) continue;
          float slope;
          out[row * width + column] =
              grouped_experts::activate<kKind>(sums(i, j), slope) * sums(i, j + 4);
        }
      }
    });
  });
}

}  // namespace mergeme::grouped_experts_fp8
