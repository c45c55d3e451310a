// The portable tile of a grouped product of e4m3 operands with scales. Torch-free.
#pragma once
#include "csrc/common/float8_blocks.h"
#include "csrc/common/grouped_tile.cuh"

namespace mergeme::grouped {

// sum[i][j] as in multiply_tile, but summed from zero over each block of 128 k and added times the
// row's and the column's scale of that block, one fused multiply-add each.
template <typename LoadA, typename LoadB, typename ScaleA, typename ScaleB>
__device__ __forceinline__ void multiply_scaled_tile(TileShared<float>& shared, int64_t depth,
                                                     LoadA load_a, LoadB load_b, ScaleA scale_a,
                                                     ScaleB scale_b, float (&sum)[8][8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i][j] = 0;
  for (int64_t block = 0; block < scale_blocks(depth); ++block) {
    const int64_t first = block * kScaleBlock;
    float partial[8][8];
    multiply_tile<true, true, false>(
        shared, depth - first < kScaleBlock ? depth - first : kScaleBlock,
        [&](int i, int64_t k) { return load_a(i, first + k); },
        [&](int j, int64_t k) { return load_b(j, first + k); }, partial);
    float right[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) right[j] = scale_b(tile_index(threadIdx.x % 8, j), block);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float left = scale_a(tile_index(threadIdx.x / 8, i), block);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = simt::fma(left * right[j], partial[i][j], sum[i][j]);
    }
  }
}

}  // namespace mergeme::grouped
