// Device code that the grouped ops share: how tiles are numbered, and the portable tile of a matrix
// product. Torch-free.
#pragma once
#include "csrc/common/numeric.h"
#include "csrc/simt/device.cuh"

namespace mergeme::grouped {

// Row tiles that never straddle two experts, without a prefix sum over experts and without the
// host reading the offsets: expert e owns the numbers from offsets[e] / height + e on. The next
// expert's first number is larger by at least ceil(rows of e / height), so all of e fits; numbers
// left over are empty tiles, at most one for each expert.
MERGEME_HD int64_t num_row_tiles(int64_t rows, int64_t num_experts, int64_t height) {
  return rows / height + num_experts;
}

struct RowTile {
  int64_t expert;
  int64_t row;  // first row of the tile
  int64_t end;  // the expert's end; the tile is empty if row >= end
};

__device__ __forceinline__ RowTile find_row_tile(const int32_t* offsets, int64_t num_experts,
                                                 int64_t num_rows, int64_t height, int64_t tile) {
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] / height + middle <= tile ? low : high) = middle;
  }
  const int64_t begin = offsets[low], end = offsets[low + 1];
  MERGEME_DEVICE_ASSERT(0 <= begin && begin <= end && end <= num_rows);
  return {low, begin + (tile - (begin / height + low)) * height, end};
}

// All threads of one block look at every boundary once.
__device__ __forceinline__ void check_expert_offsets(const int32_t* offsets, int64_t num_experts,
                                                     int64_t num_rows) {
  for (int64_t e = threadIdx.x; e < num_experts; e += blockDim.x)
    MERGEME_DEVICE_ASSERT(offsets[e] <= offsets[e + 1]);
  MERGEME_DEVICE_ASSERT(offsets[0] == 0 && offsets[num_experts] == num_rows);
}

// The tile of this block, which may lie past the last when blocks fill two dimensions.
__device__ __forceinline__ int64_t block_number() {
  return blockIdx.x + int64_t{gridDim.x} * blockIdx.y;
}

// Order of the tiles of a [row_tiles, column_tiles] grid: 8 columns of tiles at a time, row after
// row, so that the tiles alive at one moment share both their rows of a and their part of b.
struct TileGrid {
  int64_t row_tiles;
  int64_t column_tiles;
  MERGEME_HD int64_t count() const { return row_tiles * column_tiles; }
  MERGEME_HD void locate(int64_t tile, int64_t& row, int64_t& column) const {
    const int64_t group = tile / (8 * row_tiles), first = 8 * group;
    const int64_t width = column_tiles - first < 8 ? column_tiles - first : 8;
    const int64_t rest = tile - first * row_tiles;
    row = rest / width;
    column = first + rest % width;
  }
};

// One block for each tile: along x up to CUDA's limit, then along y. More tiles than that, each
// with at least one result, would not fit any memory.
inline dim3 blocks_for(const TileGrid& grid) {
  constexpr int64_t kMaxX = 2147483647;
  const int64_t y = ceil_div(grid.count(), kMaxX);
  return dim3(static_cast<unsigned>(ceil_div(grid.count(), y)), static_cast<unsigned>(y));
}

// Tiles never have more rows or columns left than this; what lies beyond does not matter to them.
__device__ __forceinline__ int clamp_left(int64_t left, int side) {
  return left < side ? static_cast<int>(left) : side;
}

// The portable tile: 64 x 64 sums by 64 threads, 8 x 8 in each, for every element type.
inline constexpr int kTile = 64;
inline constexpr int kTileThreads = 64;
inline constexpr int kTileDepth = 8;

template <typename Acc>
struct TileShared {
  Acc a[kTileDepth][kTile + 4];
  Acc b[kTileDepth][kTile + 4];
};

// Row or column, within the tile, of a thread's i-th of 8; `place` is the thread's number along it.
// Numbers i and i + 4 lie 32 apart, so shared memory is read in vectors of four without conflicts.
MERGEME_HD int tile_index(int place, int i) { return i / 4 * 32 + place * 4 + i % 4; }

// sum[i][j] = sum over k in ascending order of a(row, k) * b(column, k), one fused multiply-add
// each, where row = tile_index(threadIdx.x / 8, i) and column = tile_index(threadIdx.x % 8, j).
// load_a and load_b return the accumulation type, zero outside the matrix; kDepthFirst* says that
// neighbouring k are neighbours in memory. All threads of the block call this together.
template <bool kDepthFirstA, bool kDepthFirstB, typename Acc, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply_tile(TileShared<Acc>& shared, int64_t depth, LoadA load_a,
                                              LoadB load_b, Acc (&sum)[8][8]) {
  constexpr int kLoads = kTile * kTileDepth / kTileThreads;
  const int thread = threadIdx.x;
  Acc next_a[kLoads], next_b[kLoads];
  // Load number i of this thread: neighbouring threads read neighbouring addresses.
  const auto place = [&](bool depth_first, int i, int& row, int& k) {
    row = depth_first ? thread / kTileDepth + i * (kTileThreads / kTileDepth) : thread;
    k = depth_first ? thread % kTileDepth : i;
  };
  const auto fetch = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int row, k;
      place(kDepthFirstA, i, row, k);
      next_a[i] = first + k < depth ? load_a(row, first + k) : Acc{0};
      place(kDepthFirstB, i, row, k);
      next_b[i] = first + k < depth ? load_b(row, first + k) : Acc{0};
    }
  };
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i][j] = 0;
  // The next step's loads are under way while this one multiplies; doubles would not all fit the
  // registers then.
  constexpr bool kAhead = sizeof(Acc) == 4;
  if (kAhead) fetch(0);
  for (int64_t first = 0; first < depth; first += kTileDepth) {
    if (!kAhead) fetch(first);
    __syncthreads();  // the previous step has been read by all
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int row, k;
      place(kDepthFirstA, i, row, k);
      shared.a[k][row] = next_a[i];
      place(kDepthFirstB, i, row, k);
      shared.b[k][row] = next_b[i];
    }
    __syncthreads();
    if (kAhead && first + kTileDepth < depth) fetch(first + kTileDepth);
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k) {
      Acc a[8], b[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[i] = shared.a[k][tile_index(thread / 8, i)];
        b[i] = shared.b[k][tile_index(thread % 8, i)];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = simt::fma(a[i], b[j], sum[i][j]);
    }
  }
}

// Writes the sums, each rounded once, to out[row, column].
template <typename Out>
__device__ __forceinline__ void store_tile(const acc_t<Out> (&sum)[8][8], Out* out, int64_t ld,
                                           int rows, int columns) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = tile_index(threadIdx.x / 8, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = tile_index(threadIdx.x % 8, j);
      if (row < rows && column < columns) out[row * ld + column] = from_acc<Out>(sum[i][j]);
    }
  }
}

}  // namespace mergeme::grouped
