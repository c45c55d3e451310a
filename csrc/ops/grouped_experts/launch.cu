#include <algorithm>

#include "csrc/ops/grouped_experts/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::grouped_experts {
namespace {

// CUDA's limit on the grid's first dimension; blocks loop if a problem has more tiles.
constexpr int64_t kMaxBlocks = 2147483647;

unsigned blocks_for(int64_t tiles) { return static_cast<unsigned>(std::min(tiles, kMaxBlocks)); }

template <typename T>
void launch_gate_up(const Params& p, void* stream) {
  if (p.intermediate == 0) return;
  const auto grid = tile_grid(p, p.intermediate, grouped::kTile, grouped::kTile / 2);
  simt::launch("grouped_experts (gate_up)",
               {.grid = blocks_for(grid.count()),
                .block = grouped::kTileThreads,
                .shared_bytes = sizeof(GateUpShared<T>),
                .stream = stream},
               gate_up_kernel<T>, p);
}

template <typename T>
void launch_down(const Params& p, void* stream) {
  const auto grid = tile_grid(p, p.hidden, grouped::kTile, grouped::kTile);
  simt::launch("grouped_experts (down)",
               {.grid = blocks_for(grid.count()),
                .block = grouped::kTileThreads,
                .shared_bytes = sizeof(grouped::TileShared<acc_t<T>>),
                .stream = stream},
               down_kernel<T>, p);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;  // nothing to write
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.top_k > 0) {
      launch_gate_up<T>(p, stream);
      launch_down<T>(p, stream);
    }
    simt::launch("grouped_experts (combine)",
                 {.grid = blocks_for(p.num_tokens), .block = kCombineThreads, .stream = stream},
                 combine_kernel<T>, p);
  });
}

}  // namespace mergeme::grouped_experts
