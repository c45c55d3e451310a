#include "csrc/ops/drop_by_rank/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::drop_by_rank {

void launch(const Params& p, void* stream) {
  if (p.rows * p.length == 0) return;  // an empty grid is a launch error
  const auto blocks = static_cast<unsigned>(num_blocks(p.num_models, p.rows));
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch(
        "drop_by_rank",
        {.grid = blocks, .block = kThreads, .shared_bytes = kSharedBytes, .stream = stream},
        drop_kernel<T>, p);
  });
}

}  // namespace mergeme::drop_by_rank
