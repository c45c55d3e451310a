#include <algorithm>

#include "csrc/ops/first_nonfinite/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::first_nonfinite {

void launch(const Params& params, void* stream) {
  Params p = params;
  const int64_t runs = ceil_div(p.numel, kRun);
  p.blocks = std::min(ceil_div(runs, kThreads), kMaxBlocks);
  const simt::LaunchConfig config{.grid = static_cast<unsigned>(p.blocks),
                                  .block = kThreads,
                                  .shared_bytes = kThreads * sizeof(int64_t),
                                  .stream = stream};
  if (p.blocks > 0)  // an empty grid is a launch error
    dispatch_floating(
        p.dtype, [&]<typename T>() { simt::launch("first_nonfinite", config, find_kernel<T>, p); });
  simt::LaunchConfig one = config;
  one.grid = 1;
  simt::launch("first_nonfinite_finish", one, finish_kernel, p);
}

}  // namespace mergeme::first_nonfinite
