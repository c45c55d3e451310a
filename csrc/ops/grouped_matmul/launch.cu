#include "csrc/ops/grouped_matmul/kernel_sm80.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::grouped_matmul {
namespace {

template <typename T, Layout kLayout>
void launch_portable(const Params& p, void* stream) {
  simt::launch("grouped_matmul",
               {.grid = grouped::blocks_for(tile_grid(p, grouped::kTile, grouped::kTile)),
                .block = grouped::kTileThreads,
                .shared_bytes = sizeof(grouped::TileShared<acc_t<T>>),
                .stream = stream},
               grouped_matmul_kernel<T, kLayout>, p);
}

template <typename T, Layout kLayout>
void launch_layout(const Params& p, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (simt::compute_capability() >= 80 && fits_sm80(p)) {
      constexpr int kSide = grouped::sm80::kSide;
      return simt::launch("grouped_matmul (sm_80)",
                          {.grid = grouped::blocks_for(tile_grid(p, kSide, kSide)),
                           .block = grouped::sm80::kThreads,
                           .shared_bytes = grouped::sm80::kSharedBytes,
                           .stream = stream},
                          grouped_matmul_sm80_kernel<T, kLayout>, p);
    }
  }
  launch_portable<T, kLayout>(p, stream);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.out_columns == 0 || (p.layout == Layout::kTn ? p.a_columns : p.num_tokens) == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    switch (p.layout) {
      case Layout::kNt:
        return launch_layout<T, Layout::kNt>(p, stream);
      case Layout::kNn:
        return launch_layout<T, Layout::kNn>(p, stream);
      case Layout::kTn:
        return launch_layout<T, Layout::kTn>(p, stream);
    }
  });
}

}  // namespace mergeme::grouped_matmul
