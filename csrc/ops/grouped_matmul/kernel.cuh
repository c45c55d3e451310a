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

}  // namespace mergeme::grouped_matmul
