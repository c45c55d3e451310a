#include <algorithm>

#include "csrc/ops/masked_norms/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::masked_norms {

void launch(const Params& p, void* stream) {
  constexpr int64_t kMaxBlocks = 4096;  // grid-stride kernels: more blocks only add launch cost
  const auto models = static_cast<unsigned>(std::min<int64_t>(p.num_models, 65535));
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(p.numel, kSumBlock), kMaxBlocks));
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch(
        "masked_norms_prepare",
        {.grid = static_cast<unsigned>(ceil_div(models, 32)), .block = 32, .stream = stream},
        prepare_kernel<acc_t<T>>, p);
    if (blocks > 0)  // an empty grid is a launch error; the sums of nothing are zero
      simt::launch("masked_norms_partials",
                   {.grid = dim3(blocks, models),
                    .block = kLanes,
                    .shared_bytes = sizeof(Shared),
                    .stream = stream},
                   partials_kernel<T>, p);
    simt::launch("masked_norms_finish", {.grid = models, .block = 32, .stream = stream},
                 finish_kernel, p);
  });
}

}  // namespace mergeme::masked_norms
