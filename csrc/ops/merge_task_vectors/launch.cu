#include <algorithm>

#include "csrc/ops/merge_task_vectors/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::merge_task_vectors {
namespace {

template <typename T, Elect kElect>
void launch_merge(const Params& p, void* stream) {
  constexpr int64_t kThreads = 256;
  constexpr int64_t kMaxBlocks = 16384;  // grid-stride kernel: more blocks only add launch cost
  const int64_t groups = ceil_div(p.numel, kRun) + 1;  // an odd offset touches one more
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(groups, kThreads), kMaxBlocks));
  simt::launch("merge_task_vectors", {.grid = blocks, .block = kThreads, .stream = stream},
               merge_kernel<T, kElect>, p);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.numel == 0) return;  // an empty grid is a launch error
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(p.num_models, 32), 1024));
  dispatch_floating(p.dtype, [&]<typename T>() {
    simt::launch("merge_task_vectors_prepare", {.grid = blocks, .block = 32, .stream = stream},
                 prepare_kernel<acc_t<T>>, p);
    switch (p.elect) {
      case Elect::kNone:
        return launch_merge<T, Elect::kNone>(p, stream);
      case Elect::kSum:
        return launch_merge<T, Elect::kSum>(p, stream);
      case Elect::kCount:
        return launch_merge<T, Elect::kCount>(p, stream);
      case Elect::kUnweighted:
        return launch_merge<T, Elect::kUnweighted>(p, stream);
    }
  });
}

}  // namespace mergeme::merge_task_vectors
