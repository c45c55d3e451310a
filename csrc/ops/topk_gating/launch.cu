#include <algorithm>

#include "csrc/ops/topk_gating/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::topk_gating {
namespace {

constexpr unsigned kWarps = 4;  // of a block

simt::LaunchConfig config(int64_t num_warps, void* stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;  // grid-stride kernels: more blocks bring nothing
  return {.grid = static_cast<unsigned>(std::min(ceil_div(num_warps, kWarps), kMaxBlocks)),
          .block = kWarps * simt::kWarpSize,
          .stream = stream,
          .overlaps = true};
}

template <typename T>
void run(const Params& p, void* stream) {
  const auto start = [&](void (*kernel)(Params)) {
    simt::LaunchConfig c = config(p.num_tokens, stream);
    if (p.num_groups > 1) c.shared_bytes = kWarps * p.num_groups * sizeof(key_t<acc_t<T>>);
    simt::launch("topk_gating", c, kernel, p);
  };
  if (p.num_experts <= kLanes && p.num_groups == 1) {
    const auto start_segments = [&](int64_t width, void (*kernel)(Params)) {
      const int64_t warps = ceil_div(p.num_tokens * width, kLanes);  // tokens share a warp
      simt::launch("topk_gating", config(warps, stream), kernel, p);
    };
    if (p.num_experts <= 8) return start_segments(8, topk_segment_kernel<T, 8>);
    if (p.num_experts <= 16) return start_segments(16, topk_segment_kernel<T, 16>);
    return start_segments(32, topk_segment_kernel<T, 32>);
  }
  if (p.num_experts <= 2 * kLanes) return start(topk_kernel<T, 2>);
  if (p.num_experts <= 8 * kLanes) return start(topk_kernel<T, 8>);
  if (p.num_experts <= 32 * kLanes) return start(topk_kernel<T, 32>);
  start(topk_kernel<T, 0>);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.num_tokens == 0) return;  // an empty grid is a launch error
  dispatch_floating(p.dtype, [&]<typename T>() { run<T>(p, stream); });
}

void launch_backward(const BackwardParams& p, void* stream) {
  if (p.num_tokens == 0 || p.num_experts == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch("topk_gating_backward", config(p.num_tokens, stream), backward_kernel<T>, p);
  });
}

}  // namespace mergeme::topk_gating
