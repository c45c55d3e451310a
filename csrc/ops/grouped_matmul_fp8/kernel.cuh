#pragma once
#include "csrc/common/grouped_tile_fp8.cuh"
#include "csrc/ops/grouped_matmul_fp8/params.h"

namespace mergeme::grouped_matmul_fp8 {

// out[m, n] = sum over blocks of 128 k of a_scale[m, block] * b_scale[e, n / 128, block] * (sum
// over the block's k of a[m, k] b[e, n, k]), and zero for the rows of no expert. A block owns one
// tile of results at a time; every result belongs to one tile and one thread, so plain stores do.
template <typename Out>
__global__ void __launch_bounds__(grouped::kTileThreads) grouped_matmul_fp8_kernel(Params p) {
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<grouped::TileShared<float>>();
  const int64_t blocks = scale_blocks(p.depth);
  grouped::for_each_row_tile(p.plan, p.grid, kTile, kTile, [&](const grouped::Tile& tile) {
    const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
    const int columns = grouped::clamp_left(p.columns - tile.column, kTile);
    const bool owned = tile.group < p.num_experts;
    const int64_t expert = owned ? tile.group : 0;
    const float8_e4m3_t* a = p.a + tile.row * p.depth;
    const float8_e4m3_t* b = p.b + (expert * p.columns + tile.column) * p.depth;
    const float* a_scale = p.a_scale + tile.row * blocks;
    // A tile of 64 columns lies in one block of 128.
    const float* b_scale =
        p.b_scale + (expert * scale_blocks(p.columns) + tile.column / kScaleBlock) * blocks;
    float sum[8][8];
    grouped::multiply_scaled_tile(
        shared, owned ? p.depth : 0,
        [&](int i, int64_t k) { return i < rows ? to_acc(a[i * p.depth + k]) : 0.f; },
        [&](int j, int64_t k) { return j < columns ? to_acc(b[j * p.depth + k]) : 0.f; },
        [&](int i, int64_t block) { return i < rows ? a_scale[i * blocks + block] : 0.f; },
        [&](int, int64_t block) { return b_scale[block]; }, sum);
    grouped::store_tile(sum, static_cast<Out*>(p.out) + tile.row * p.columns + tile.column,
                        p.columns, rows, columns);
  });
}

}  // namespace mergeme::grouped_matmul_fp8
