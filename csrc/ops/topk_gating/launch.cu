#include <algorithm>

#include "csrc/ops/topk_gating/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::topk_gating {
namespace {

constexpr unsigned kWarps = 4;  // tokens of a block

simt::LaunchConfig config(int64_t num_tokens, void* stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;  // grid-stride kernels: more blocks bring nothing
  return {.grid = static_cast<unsigned>(std::min(ceil_div(num_tokens, kWarps), kMaxBlocks)),
          .block = kWarps * simt::kWarpSize,
          .stream = stream};
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.num_tokens == 0) return;  // an empty grid is a launch error
  const auto run = [&](void (*kernel)(Params)) {
    simt::launch("topk_gating", config(p.num_tokens, stream), kernel, p);
  };
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.num_experts <= 2 * kLanes) return run(topk_kernel<T, 2>);
    if (p.num_experts <= 8 * kLanes) return run(topk_kernel<T, 8>);
    if (p.num_experts <= 32 * kLanes) return run(topk_kernel<T, 32>);
    run(topk_kernel<T, 0>);
  });
}

void launch_backward(const BackwardParams& p, void* stream) {
  if (p.num_tokens == 0 || p.num_experts == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch("topk_gating_backward", config(p.num_tokens, stream), backward_kernel<T>, p);
  });
}

}  // namespace mergeme::topk_gating
