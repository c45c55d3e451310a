#include <algorithm>

#include "csrc/ops/sort_by_expert/kernel.cuh"
#include "csrc/simt/launch.h"

namespace mergeme::sort_by_expert {
namespace {

template <bool kShared>
void run(const Params& p, void* stream) {
  const simt::LaunchConfig warps{
      .grid = static_cast<unsigned>(p.num_chunks),
      .block = simt::kWarpSize,
      .shared_bytes = kShared ? sizeof(int32_t) * static_cast<size_t>(p.num_buckets) : 0,
      .stream = stream,
      .overlaps = true};
  simt::launch("sort_by_expert count", warps, count_kernel<kShared>, p);
  simt::launch("sort_by_expert scan",
               {.grid = 1,
                .block = kScanThreads,
                .shared_bytes = 2 * kScanThreads * sizeof(int32_t),
                .stream = stream,
                .overlaps = true},
               scan_kernel, p);
  simt::launch("sort_by_expert place", warps, place_kernel<kShared>, p);
}

void run_small(Params p, void* stream) {
  p.chunk = ceil_div(ceil_div(p.num_slots, kSmallWarps), 32) * 32;
  const auto counters = static_cast<size_t>(p.num_buckets * kSmallChunks);
  simt::launch("sort_by_expert",
               {.grid = 1,
                .block = kScanThreads,
                .shared_bytes = (2 * kScanThreads + counters) * sizeof(int32_t),
                .stream = stream,
                .overlaps = true},
               small_kernel, p);
}

}  // namespace

void launch(const Params& p, void* stream) {
  constexpr int64_t kSharedExperts = 4096;  // 16 KB of counters: a dozen warps still share an SM
  constexpr int64_t kSmallSlots = 4096, kSmallBuckets = 640;  // 46.5 KB with the sums
  if (p.num_slots <= kSmallSlots && p.num_buckets <= kSmallBuckets)
    run_small(p, stream);
  else if (p.num_buckets <= kSharedExperts)
    run<true>(p, stream);
  else
    run<false>(p, stream);
}

void launch_drop(const DropParams& p, void* stream) {
  constexpr int64_t kMaxBlocks = 4096;
  if (p.num_slots == 0) return;
  const simt::LaunchConfig warps{.grid = static_cast<unsigned>(std::min(p.num_experts, kMaxBlocks)),
                                 .block = simt::kWarpSize,
                                 .stream = stream,
                                 .overlaps = true};
  simt::launch("sort_by_expert drop", warps, p.wide ? drop_kernel<double> : drop_kernel<float>, p);
}

}  // namespace mergeme::sort_by_expert
