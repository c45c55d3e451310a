#include <algorithm>

#include "csrc/ops/combine_rows/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::combine_rows {

void launch(const Params& p, void* stream) {
  if (p.numel == 0) return;  // an empty grid is a launch error
  constexpr int64_t kThreads = 256;
  constexpr int64_t kMaxBlocks = 16384;  // grid-stride kernel: more blocks only add launch cost
  const int64_t runs = ceil_div(p.numel, kRun);
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(runs, kThreads), kMaxBlocks));
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch("combine_rows", {.grid = blocks, .block = kThreads, .stream = stream},
                 combine_rows_kernel<T>, p);
  });
}

}  // namespace mergeme::combine_rows
