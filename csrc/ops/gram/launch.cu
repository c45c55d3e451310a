#include <algorithm>

#include "csrc/ops/gram/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::gram {

namespace {

constexpr int64_t kMaxBlocks = 16384;  // grid-stride kernels: more blocks only add launch cost

// Sums with squares of kTile by kTile models in each thread.
template <int kTile>
void launch_sums(const Params& p, void* stream) {
  const int64_t squares = ceil_div(p.num_models, kTile);
  const auto tiles = static_cast<unsigned>(squares * (squares + 1) / 2);
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.axis == Axis::kRow) {
      const int64_t blocks = std::min(ceil_div(p.groups * p.blocks, kRowWarps), kMaxBlocks);
      simt::launch("gram_row",
                   {.grid = dim3(static_cast<unsigned>(blocks), tiles),
                    .block = kRowWarps * simt::kWarpSize,
                    .stream = stream},
                   row_kernel<T, kTile>, p);
    } else {
      const int64_t blocks = std::min(ceil_div(p.groups, kColumns), kMaxBlocks);
      const auto deep = static_cast<unsigned>(std::min<int64_t>(p.blocks, 1024));
      simt::launch("gram_column",
                   {.grid = dim3(static_cast<unsigned>(blocks), tiles, deep),
                    .block = kColumns,
                    .stream = stream},
                   column_kernel<T, kTile>, p);
    }
  });
}

}  // namespace

void launch(const Params& p, void* stream) {
  constexpr int64_t kThreads = 128;
  const int64_t entries = p.groups * p.num_models * p.num_models;
  if (entries == 0) return;  // an empty grid is a launch error
  if (p.blocks > 0) {        // the sums of nothing are zero
    if (p.num_models <= 2)
      launch_sums<2>(p, stream);
    else
      launch_sums<4>(p, stream);
  }
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(entries, kThreads), kMaxBlocks));
  simt::launch("gram_finish", {.grid = blocks, .block = kThreads, .stream = stream}, finish_kernel,
               p);
}

}  // namespace mergeme::gram
