#include <algorithm>

#include "csrc/ops/grouped_matmul/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::grouped_matmul {
namespace {

// CUDA's limit on the grid's first dimension; blocks loop if a problem has more tiles.
constexpr int64_t kMaxBlocks = 2147483647;

template <typename T, Layout kLayout>
void launch_portable(const Params& p, void* stream) {
  const int64_t tiles = tile_grid(p, grouped::kTile, grouped::kTile).count();
  simt::launch("grouped_matmul",
               {.grid = static_cast<unsigned>(std::min(tiles, kMaxBlocks)),
                .block = grouped::kTileThreads,
                .shared_bytes = sizeof(grouped::TileShared<acc_t<T>>),
                .stream = stream},
               grouped_matmul_kernel<T, kLayout>, p);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.out_columns == 0 || (p.layout == Layout::kTn ? p.a_columns : p.num_tokens) == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    switch (p.layout) {
      case Layout::kNt:
        return launch_portable<T, Layout::kNt>(p, stream);
      case Layout::kNn:
        return launch_portable<T, Layout::kNn>(p, stream);
      case Layout::kTn:
        return launch_portable<T, Layout::kTn>(p, stream);
    }
  });
}

}  // namespace mergeme::grouped_matmul
