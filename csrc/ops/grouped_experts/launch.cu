#include <algorithm>

#include "csrc/ops/grouped_experts/kernel_sm80.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::grouped_experts {
namespace {

template <typename T>
void launch_gate_up(const Params& p, void* stream) {
  if (p.intermediate == 0) return;
  const auto grid = tile_grid(p, p.intermediate, grouped::kTile, grouped::kTile / 2);
  simt::launch("grouped_experts (gate_up)",
               {.grid = grouped::blocks_for(grid),
                .block = grouped::kTileThreads,
                .shared_bytes = sizeof(GateUpShared<T>),
                .stream = stream},
               gate_up_kernel<T>, p);
}

template <typename T>
void launch_down(const Params& p, void* stream) {
  const auto grid = tile_grid(p, p.hidden, grouped::kTile, grouped::kTile);
  simt::launch("grouped_experts (down)",
               {.grid = grouped::blocks_for(grid),
                .block = grouped::kTileThreads,
                .shared_bytes = sizeof(grouped::TileShared<acc_t<T>>),
                .stream = stream},
               down_kernel<T>, p);
}

template <typename T>
void launch_sm80(const Params& p, void* stream) {
  using grouped::sm80::kSide;
  const auto config = [&](int64_t columns, int64_t width) {
    return simt::LaunchConfig{.grid = grouped::blocks_for(tile_grid(p, columns, kSide, width)),
                              .block = grouped::sm80::kThreads,
                              .shared_bytes = grouped::sm80::kSharedBytes,
                              .stream = stream};
  };
  if (p.intermediate > 0)
    simt::launch("grouped_experts (gate_up, sm_80)", config(p.intermediate, kGateUpWidth),
                 gate_up_sm80_kernel<T>, p);
  simt::launch("grouped_experts (down, sm_80)", config(p.hidden, kSide), down_sm80_kernel<T>, p);
}

template <typename T>
void launch_products(const Params& p, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (simt::compute_capability() >= 80 && fits_sm80(p)) return launch_sm80<T>(p, stream);
  }
  launch_gate_up<T>(p, stream);
  launch_down<T>(p, stream);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;  // nothing to write
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.top_k > 0) launch_products<T>(p, stream);
    constexpr int64_t kMaxBlocks = 1 << 20;  // each block loops over tokens
    simt::launch("grouped_experts (combine)",
                 {.grid = static_cast<unsigned>(std::min(p.num_tokens, kMaxBlocks)),
                  .block = kCombineThreads,
                  .stream = stream},
                 combine_kernel<T>, p);
  });
}

}  // namespace mergeme::grouped_experts
