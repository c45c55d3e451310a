#include <algorithm>

#include "csrc/ops/quantize_fp8/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::quantize_fp8 {

void launch(const Params& p, void* stream) {
  if (p.num_rows == 0 || p.blocks == 0) return;  // an empty grid is a launch error
  constexpr int64_t kWarps = kThreads / simt::kWarpSize;
  constexpr int64_t kMaxBlocks = 16384;  // grid-stride kernel: more blocks only add launch cost
  const auto blocks =
      static_cast<unsigned>(std::min(ceil_div(p.num_rows * p.blocks, kWarps), kMaxBlocks));
  dispatch_floating(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) <= 4)
      simt::launch("quantize_fp8", {.grid = blocks, .block = kThreads, .stream = stream},
                   quantize_fp8_kernel<T>, p);
  });
}

}  // namespace mergeme::quantize_fp8
