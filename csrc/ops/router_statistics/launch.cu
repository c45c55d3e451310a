#include <algorithm>

#include "csrc/ops/router_statistics/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::router_statistics {

void launch(const Params& p, void* stream) {
  constexpr int64_t kSharedExperts = 4096;  // sums and counts of 48 KB at most
  constexpr unsigned kThreads = 128;
  const bool shared = p.num_experts <= kSharedExperts;
  dispatch_floating(p.dtype, [&]<typename T>() {
    using A = acc_t<T>;
    if (p.num_chunks > 0)  // an empty grid is a launch error
      simt::launch(
          "router_statistics",
          {.grid = static_cast<unsigned>(p.num_chunks),
           .block = simt::kWarpSize,
           .shared_bytes =
               shared ? static_cast<size_t>(p.num_experts) * (sizeof(A) + sizeof(int32_t)) : 0,
           .stream = stream,
           .overlaps = true},
          shared ? sum_kernel<T, true> : sum_kernel<T, false>, p);
    simt::launch("router_statistics finish",
                 {.grid = static_cast<unsigned>(ceil_div(p.num_experts + 1, kThreads)),
                  .block = kThreads,
                  .stream = stream,
                  .overlaps = true},
                 finish_kernel<A>, p);
  });
}

void launch_backward(const BackwardParams& p, void* stream) {
  constexpr unsigned kWarps = 4;           // tokens of a block
  constexpr int64_t kMaxBlocks = 1 << 20;  // grid-stride: more blocks bring nothing
  if (p.num_tokens == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch(
        "router_statistics_backward",
        {.grid = static_cast<unsigned>(std::min(ceil_div(p.num_tokens, kWarps), kMaxBlocks)),
         .block = kWarps * simt::kWarpSize,
         .stream = stream,
         .overlaps = true},
        backward_kernel<T>, p);
  });
}

}  // namespace mergeme::router_statistics
