#pragma once
#include "csrc/common/grouped_plan.cuh"
#include "csrc/common/grouped_tile.cuh"
#include "csrc/ops/grouped_matmul/params.h"

namespace mergeme::grouped_matmul {

// nt: out[m, n] = sum_k a[m, k] b[e, n, k]; nn: ... b[e, k, n], and zero for the rows of no expert;
// tn: out[e, i, j] = sum_m a[m, i] b[m, j] over the tokens m of expert e. A block owns one tile of
// results at a time; every result belongs to one tile and one thread, so plain stores do.
template <typename T, Layout kLayout>
__global__ void __launch_bounds__(grouped::kTileThreads) grouped_matmul_kernel(Params p) {
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<grouped::TileShared<acc_t<T>>>();
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  T* out = static_cast<T*>(p.out);
  if constexpr (kLayout == Layout::kTn) {
    grouped::for_each_sum_tile(p.expert_offsets, p.grid, kTile, kTile,
                               [&](const grouped::SumTile& tile) {
                                 grouped::multiply_sums(shared, tile, a, nullptr, b, nullptr, out,
                                                        p.a_columns, p.out_columns);
                               });
  } else {
    grouped::for_each_row_tile(p.plan, p.grid, kTile, kTile, [&](const grouped::Tile& tile) {
      grouped::multiply_rows<kLayout == Layout::kNt>(shared, tile, a, b, out, p.a_columns,
                                                     p.out_columns, p.num_experts);
    });
  }
}

inline constexpr int kZeroThreads = 256;

// Zeros in the rows of out that belong to no expert (nt, nn), or in the matrices of experts without
// rows (tn), 8 elements of 2 bytes at a time. A block owns every gridDim.x-th expert's matrix, or
// stretch of 256 chunks; as a rule there is nothing to do.
template <Layout kLayout>
__global__ void __launch_bounds__(kZeroThreads) zeros_kernel(Params p) {
  uint4* out = static_cast<uint4*>(p.out);
  const int64_t row = p.out_columns / 8;
  if constexpr (kLayout == Layout::kTn) {
    const int64_t size = p.a_columns * row;
    for (int64_t e = blockIdx.x; e < p.num_experts; e += gridDim.x)
      if (p.expert_offsets[e] == p.expert_offsets[e + 1])
        for (int64_t i = threadIdx.x; i < size; i += kZeroThreads) out[e * size + i] = uint4{};
  } else {
    const int64_t end = p.num_tokens * row, step = int64_t{gridDim.x} * kZeroThreads;
    int64_t i = p.expert_offsets[p.num_experts] * row + int64_t{blockIdx.x} * kZeroThreads;
    for (i += threadIdx.x; i < end; i += step) out[i] = uint4{};
  }
}

}  // namespace mergeme::grouped_matmul
