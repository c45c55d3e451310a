#include <algorithm>

#include "csrc/ops/magnitude_threshold/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::magnitude_threshold {
namespace {

constexpr int64_t kMaxBlocks = 1024;  // of one model: more would only flush more histograms
constexpr int64_t kPerBlock = 4096;   // elements worth a block
constexpr size_t kLocateBytes = (kThreads + 2) * sizeof(int64_t);

template <typename T>
void run(Params p, void* stream) {
  const auto models = static_cast<unsigned>(std::min<int64_t>(p.num_models, 65535));
  // Without elements one block still runs: the cut of an empty tensor keeps nothing.
  const auto blocks =
      static_cast<unsigned>(std::clamp<int64_t>(ceil_div(p.numel, kPerBlock), 1, kMaxBlocks));
  simt::launch(
      "magnitude_threshold_start",
      {.grid = static_cast<unsigned>(std::min(p.num_models * (kBins / kThreads), kMaxBlocks)),
       .block = kThreads,
       .stream = stream},
      start_kernel, p);
  for (int known = Magnitude<acc_t<T>>::kBits; known > 0; known = p.shift) {
    p.digit_bits = std::min(known, kDigitBits);
    p.shift = known - p.digit_bits;
    simt::launch("magnitude_threshold_histogram",
                 {.grid = dim3(blocks, models),
                  .block = kThreads,
                  .shared_bytes = kBins * sizeof(unsigned),
                  .stream = stream},
                 histogram_kernel<T>, p);
    simt::launch("magnitude_threshold_pick",
                 {.grid = models,
                  .block = kThreads,
                  .shared_bytes = kThreads * sizeof(Count),
                  .stream = stream},
                 pick_kernel, p);
  }
  p.tile = std::max(ceil_div(p.numel, kMaxTiles), kPerBlock);
  simt::launch("magnitude_threshold_count_equal",
               {.grid = dim3(blocks, models),
                .block = kThreads,
                .shared_bytes = sizeof(unsigned),
                .stream = stream},
               count_equal_kernel<T>, p);
  simt::launch("magnitude_threshold_locate",
               {.grid = models, .block = kThreads, .shared_bytes = kLocateBytes, .stream = stream},
               locate_kernel<T>, p);
}

}  // namespace

void launch(const Params& params, void* stream) {
  dispatch_floating(params.dtype, [&]<typename T>() { run<T>(params, stream); });
}

}  // namespace mergeme::magnitude_threshold
