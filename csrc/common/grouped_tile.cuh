// The portable tile of a grouped matrix product. Torch-free.
#pragma once
#include "csrc/common/grouped_plan.cuh"

namespace mergeme::grouped {

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
// neighbouring k are neighbours in memory, and kMayFetchAhead that a caller leaves registers for
// it. All threads of the block call this together.
template <bool kDepthFirstA, bool kDepthFirstB, bool kMayFetchAhead = true, typename Acc,
          typename LoadA, typename LoadB>
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
  constexpr bool kAhead = kMayFetchAhead && sizeof(Acc) == 4;
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

// One tile of out[m, n] = sum_k a[m, k] b[e, n, k] (kNt) or ... b[e, k, n] for the rows m of expert
// e; a is [M, k], out [M, n]. Zeros for the rows of no expert.
template <bool kNt, typename T, typename Out>
__device__ __forceinline__ void multiply_rows(TileShared<acc_t<T>>& shared, const Tile& tile,
                                              const T* a, const T* b, Out* out, int64_t k,
                                              int64_t n, int64_t num_experts) {
  using Acc = acc_t<T>;
  const int rows = clamp_left(tile.end - tile.row, kTile);
  const int columns = clamp_left(n - tile.column, kTile);
  const bool owned = tile.group < num_experts;
  const T* left = a + tile.row * k;
  const T* right = b + (owned ? tile.group : 0) * n * k + tile.column * (kNt ? k : 1);
  Acc sum[8][8];
  multiply_tile<true, kNt>(
      shared, owned ? k : 0,
      [&](int i, int64_t l) { return i < rows ? to_acc(left[i * k + l]) : Acc{0}; },
      [&](int j, int64_t l) {
        return j < columns ? to_acc(right[kNt ? j * k + l : l * n + j]) : Acc{0};
      },
      sum);
  store_tile(sum, out + tile.row * n + tile.column, n, rows, columns);
}

// One tile of out[e, i, j] = sum over the rows m of expert e of a[m, i] b[m, j]; a is [M, n1], b
// [M, n2]. With an index, row m of that operand is row index[m] of what is given.
template <typename T>
__device__ __forceinline__ void multiply_sums(TileShared<acc_t<T>>& shared, const SumTile& tile,
                                              const T* a, const int32_t* index_a, const T* b,
                                              const int32_t* index_b, T* out, int64_t n1,
                                              int64_t n2) {
  using Acc = acc_t<T>;
  const int rows = clamp_left(n1 - tile.row, kTile);
  const int columns = clamp_left(n2 - tile.column, kTile);
  const auto row_of = [&](const int32_t* index, int64_t k) {
    return index != nullptr ? int64_t{index[tile.begin + k]} : tile.begin + k;
  };
  Acc sum[8][8];
  multiply_tile<false, false>(
      shared, tile.end - tile.begin,
      [&](int i, int64_t k) {
        return i < rows ? to_acc(a[row_of(index_a, k) * n1 + tile.row + i]) : Acc{0};
      },
      [&](int j, int64_t k) {
        return j < columns ? to_acc(b[row_of(index_b, k) * n2 + tile.column + j]) : Acc{0};
      },
      sum);
  store_tile(sum, out + (tile.expert * n1 + tile.row) * n2 + tile.column, n2, rows, columns);
}

}  // namespace mergeme::grouped
