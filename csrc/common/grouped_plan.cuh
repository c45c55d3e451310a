// Device code that builds and reads the list of row tiles. Torch-free.
#pragma once
#include "csrc/common/grouped_plan.h"
#include "csrc/simt/device.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::grouped {

struct PlanParams {
  Plan plan = nullptr;                      // plan_bytes() bytes; null to check only
  int32_t* tokens = nullptr;                // [num_rows]: row -> token, -1 for rows of no expert
  const int32_t* expert_offsets = nullptr;  // [E + 1], non-decreasing from 0 to at most num_rows
  const int32_t* permutation = nullptr;     // [num_rows] or null: row -> slot
  const int32_t* inverse = nullptr;         // [num_rows] or null: slot -> row
  int64_t num_rows = 0;
  int64_t num_experts = 0;  // E, at least 1
  int64_t top_k = 1;        // slots of a token
  int64_t height = 1;       // rows of a tile
  bool list_rest = false;   // list the rows of no expert too
};

inline constexpr int kPlanThreads = 128;

// The inclusive prefix sum of `value` over the block's threads; `total` is the sum of all. A
// barrier must come before the next call.
__device__ __forceinline__ int32_t scan_block(int32_t* shared, int32_t value, int32_t& total) {
  const int lane = simt::lane_id(), warp = simt::warp_id();
  constexpr int kWarps = kPlanThreads / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = __shfl_up_sync(simt::kFullWarp, value, distance);
    if (lane >= distance) value += other;
  }
  if (lane == 31) shared[warp] = value;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) value += total;
    total += shared[w];
  }
  return value;
}

// Checks every index that later kernels follow blindly, writes `tokens` where there is a
// permutation, and builds the list. Block 0 owns the list: its threads own one group each, 128 at a
// time; every tile belongs to one group and its lane, so plain stores do. The rows are dealt to all
// blocks.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) plan_kernel(PlanParams p) {
  simt::begin_overlapped();
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.num_rows; i += step) {
    if (p.inverse != nullptr) MERGEME_DEVICE_ASSERT(0 <= p.inverse[i] && p.inverse[i] < p.num_rows);
    if (p.permutation == nullptr) continue;
    MERGEME_DEVICE_ASSERT(0 <= p.permutation[i] && p.permutation[i] < p.num_rows);
    const bool owned = i < p.expert_offsets[p.num_experts];
    p.tokens[i] = owned ? p.permutation[i] / static_cast<int32_t>(p.top_k) : -1;
  }
  if (blockIdx.x > 0) return;
  MERGEME_DEVICE_ASSERT(p.expert_offsets[0] == 0);
  MERGEME_DEVICE_ASSERT(p.expert_offsets[p.num_experts] <= p.num_rows);
  int32_t* shared = simt::dynamic_shared<int32_t>();  // [kThreads / 32 + 3 * kThreads]
  int32_t* begins = shared + kThreads / 32;
  int32_t *ends = begins + kThreads, *firsts = ends + kThreads;
  int32_t before = 0;
  for (int64_t g0 = 0; g0 <= p.num_experts; g0 += kThreads) {
    const int64_t e = g0 + threadIdx.x;
    int64_t begin = 0, end = 0;
    if (e < p.num_experts) {
      MERGEME_DEVICE_ASSERT(p.expert_offsets[e] <= p.expert_offsets[e + 1]);
      begin = p.expert_offsets[e];
      end = p.expert_offsets[e + 1];
    } else if (e == p.num_experts && p.list_rest) {
      begin = p.expert_offsets[e];
      end = p.num_rows;
    }
    if (p.plan == nullptr) continue;  // the same for all threads
    const auto count = static_cast<int32_t>(ceil_div(end - begin, p.height));
    int32_t total;
    const int32_t first = before + scan_block(shared, count, total) - count;
    begins[threadIdx.x] = static_cast<int32_t>(begin);
    ends[threadIdx.x] = static_cast<int32_t>(end);
    firsts[threadIdx.x] = first;
    before += total;
    __syncthreads();
    for (int g = simt::warp_id(); g < kThreads; g += kThreads / 32) {
      const GroupTile tile{static_cast<int32_t>(g0 + g), begins[g], ends[g], firsts[g]};
      const auto tiles = static_cast<int32_t>(ceil_div(tile.end - tile.begin, p.height));
      for (int32_t i = simt::lane_id(); i < tiles; i += 32) p.plan[1 + tile.first + i] = tile;
    }  // the next scan has a barrier before these are overwritten
  }
  if (p.plan != nullptr && threadIdx.x == 0) p.plan[0].first = before;
}

inline void launch_plan(const PlanParams& p, void* stream) {
  constexpr int64_t kRowsOfBlock = 8 * kPlanThreads, kMaxBlocks = 1024;
  const int64_t blocks = ceil_div(p.permutation != nullptr ? p.num_rows : 1, kRowsOfBlock);
  simt::launch("grouped plan",
               {.grid = static_cast<unsigned>(blocks < 1            ? 1
                                              : blocks > kMaxBlocks ? kMaxBlocks
                                                                    : blocks),
                .block = kPlanThreads,
                .shared_bytes = (kPlanThreads / 32 + 3 * kPlanThreads) * sizeof(int32_t),
                .stream = stream,
                .overlaps = true},
               plan_kernel<kPlanThreads>, p);
}

// One tile of a product: rows [row, end) of a group, at most `height` of them, from `column` on.
struct Tile {
  int32_t group;
  int32_t row;
  int32_t end;
  int32_t column;
};

// Order of a group's [row_tiles, column_tiles] grid: 8 columns of tiles at a time, row after row,
// so that the tiles alive at one moment share both their rows of a and their part of b.
MERGEME_HD void locate(int number, int row_tiles, int column_tiles, int& row, int& column) {
  const int band = 8 * row_tiles, first = number / band * 8;
  const int width = column_tiles - first < 8 ? column_tiles - first : 8;
  const int rest = number - first * row_tiles;
  row = rest / width;
  column = first + rest % width;
}

// Calls run(tile) for this block's share of the planned rows times the columns, group by group:
// blocks stride over all tiles, so there may be any number of them. The same for all threads of a
// block. The kernel may be launched with `overlaps` if it touches no global memory before.
template <typename Run>
__device__ __forceinline__ void for_each_row_tile(const GroupTile* plan, const TileGrid& grid,
                                                  int height, int width, Run run,
                                                  int block = blockIdx.x, int blocks = gridDim.x) {
  simt::begin_overlapped();
  for (int number = block; number < plan[0].first * grid.column_tiles; number += blocks) {
    const GroupTile t = plan[1 + number / grid.column_tiles];
    int row, column;
    locate(number - t.first * grid.column_tiles, (t.end - t.begin + height - 1) / height,
           grid.column_tiles, row, column);
    run(Tile{t.group, t.begin + row * height, t.end, column * width});
  }
}

// The same for products with one matrix of results for each expert; `row` is its row, and begin and
// end are the rows that are summed over.
struct SumTile {
  int32_t expert;
  int32_t begin;
  int32_t end;
  int32_t row;
  int32_t column;
};
template <typename Run>
__device__ __forceinline__ void for_each_sum_tile(const int32_t* expert_offsets,
                                                  const TileGrid& grid, int height, int width,
                                                  Run run) {
  simt::begin_overlapped();
  for (int number = blockIdx.x; number < grid.count; number += gridDim.x) {
    const int expert = number / grid.matrix_tiles;
    int row, column;
    locate(number - expert * grid.matrix_tiles, grid.row_tiles, grid.column_tiles, row, column);
    run(SumTile{expert, expert_offsets[expert], expert_offsets[expert + 1], row * height,
                column * width});
  }
}

// Kernels count tiles, and the rows and columns of one matrix, in 32 bits with room for one more
// stride of any grid. More than that would not fit any memory.
inline TileGrid checked_grid(const char* op, int64_t matrices, int64_t row_tiles,
                             int64_t column_tiles) {
  const int64_t count = matrices * row_tiles * column_tiles;
  if (count > (int64_t{1} << 30) || column_tiles > (int64_t{1} << 23))
    throw std::runtime_error(std::string(op) + ": expected at most 2^30 tiles, got " +
                             std::to_string(matrices) + " x " + std::to_string(row_tiles) + " x " +
                             std::to_string(column_tiles));
  return {static_cast<int32_t>(row_tiles), static_cast<int32_t>(column_tiles),
          static_cast<int32_t>(row_tiles * column_tiles), static_cast<int32_t>(count)};
}

// Launches a kernel whose blocks stride over the tiles of params.grid.
template <auto kKernel, typename Params>
void launch_tiles(const char* name, const simt::LaunchConfig& config, const Params& params) {
  simt::launch_resident<kKernel>(name, config, params.grid.count, params);
}

// Planned rows, and columns in tiles of `width`.
inline TileGrid row_grid(const char* op, int64_t rows, int64_t num_experts, int64_t height,
                         int64_t columns, int64_t width) {
  return checked_grid(op, 1, max_row_tiles(rows, num_experts, height), ceil_div(columns, width));
}

// One [rows, columns] matrix for each expert.
inline TileGrid sum_grid(const char* op, int64_t num_experts, int64_t rows, int64_t height,
                         int64_t columns, int64_t width) {
  return checked_grid(op, num_experts, ceil_div(rows, height), ceil_div(columns, width));
}

}  // namespace mergeme::grouped
