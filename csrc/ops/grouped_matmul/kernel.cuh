#pragma once
#include "csrc/common/grouped_tile.cuh"
#include "csrc/ops/grouped_matmul/params.h"

namespace mergeme::grouped_matmul {

// Tiles of the whole problem for blocks of height x width results.
MERGEME_HD grouped::TileGrid tile_grid(const Params& p, int64_t height, int64_t width) {
  return {p.layout == Layout::kTn ? p.num_experts * ceil_div(p.a_columns, height)
                                  : grouped::num_row_tiles(p.num_tokens, p.num_experts, height),
          ceil_div(p.out_columns, width)};
}

// One tile of one expert's product. Rows count within out's rows: tokens (nt, nn), or N1 (tn).
struct Tile {
  int64_t expert;
  int64_t row;     // first row
  int64_t end;     // rows end here
  int64_t column;  // first column
  int64_t token;   // tn: the expert's first token
  int64_t depth;   // length of the reduction
};

template <Layout kLayout>
__device__ __forceinline__ Tile find_tile(const Params& p, const grouped::TileGrid& grid,
                                          int64_t number, int64_t height, int64_t width) {
  if (number >= grid.count()) return {};
  int64_t row_tile, column_tile;
  grid.locate(number, row_tile, column_tile);
  if constexpr (kLayout == Layout::kTn) {
    const int64_t tiles = ceil_div(p.a_columns, height), expert = row_tile / tiles;
    const int64_t begin = p.expert_offsets[expert], end = p.expert_offsets[expert + 1];
    MERGEME_DEVICE_ASSERT(0 <= begin && begin <= end && end <= p.num_tokens);
    return {expert,     row_tile % tiles * height, p.a_columns, column_tile * width, begin,
            end - begin};
  } else {
    const auto tile =
        grouped::find_row_tile(p.expert_offsets, p.num_experts, p.num_tokens, height, row_tile);
    return {tile.expert, tile.row, tile.end, column_tile * width, 0, p.a_columns};
  }
}

// nt: out[m, n] = sum_k a[m, k] b[e, n, k]; nn: ... b[e, k, n]; tn: out[e, i, j] = sum_m a[m, i]
// b[m, j] over the tokens m of expert e. A block owns one tile of results; every result belongs to
// one tile and one thread, so plain stores do.
template <typename T, Layout kLayout>
__global__ void __launch_bounds__(grouped::kTileThreads) grouped_matmul_kernel(Params p) {
  using Acc = acc_t<T>;
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<grouped::TileShared<Acc>>();
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const int64_t number = grouped::block_number();
  if (number == 0) grouped::check_expert_offsets(p.expert_offsets, p.num_experts, p.num_tokens);
  const Tile tile = find_tile<kLayout>(p, tile_grid(p, kTile, kTile), number, kTile, kTile);
  if (tile.row >= tile.end) return;  // the same for all threads of the block
  const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
  const int columns = grouped::clamp_left(p.out_columns - tile.column, kTile);
  Acc sum[8][8];
  if constexpr (kLayout == Layout::kTn) {
    a += tile.token * p.a_columns + tile.row;
    b += tile.token * p.out_columns + tile.column;
    grouped::multiply_tile<false, false>(
        shared, tile.depth,
        [&](int i, int64_t k) { return i < rows ? to_acc(a[k * p.a_columns + i]) : Acc{0}; },
        [&](int j, int64_t k) { return j < columns ? to_acc(b[k * p.out_columns + j]) : Acc{0}; },
        sum);
  } else {
    constexpr bool kNt = kLayout == Layout::kNt;
    a += tile.row * p.a_columns;
    b += tile.expert * p.out_columns * p.a_columns + tile.column * (kNt ? p.a_columns : 1);
    grouped::multiply_tile<true, kNt>(
        shared, tile.depth,
        [&](int i, int64_t k) { return i < rows ? to_acc(a[i * p.a_columns + k]) : Acc{0}; },
        [&](int j, int64_t k) {
          return j < columns ? to_acc(b[kNt ? j * p.a_columns + k : k * p.out_columns + j])
                             : Acc{0};
        },
        sum);
  }
  const int64_t first = kLayout == Layout::kTn ? tile.expert * p.a_columns + tile.row : tile.row;
  grouped::store_tile(sum, static_cast<T*>(p.out) + first * p.out_columns + tile.column,
                      p.out_columns, rows, columns);
}

}  // namespace mergeme::grouped_matmul
