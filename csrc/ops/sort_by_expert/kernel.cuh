#pragma once
#include "csrc/common/kth_largest.cuh"
#include "csrc/common/order_key.h"
#include "csrc/ops/sort_by_expert/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::sort_by_expert {

inline constexpr int kScanThreads = 512;

// What one warp counts and places: slots begin to end, and where its counters lie, one for each
// expert, `step` apart.
struct Chunk {
  int64_t begin, end;
  int32_t* counters;
  int64_t step;

  __device__ __forceinline__ Chunk(const Params& p, int64_t number, int32_t* counters, int64_t step)
      : begin(number * p.chunk < p.num_slots ? number * p.chunk : p.num_slots),
        end(begin + p.chunk < p.num_slots ? begin + p.chunk : p.num_slots),
        counters(counters),
        step(step) {}
  __device__ __forceinline__ int32_t* counter(int64_t expert) const {
    return counters + expert * step;
  }
};

// The block's chunk with its counters in shared memory, or, for more experts than fit there, in the
// chunk's own column of counts.
template <bool kShared>
__device__ __forceinline__ Chunk own_chunk(const Params& p) {
  return kShared ? Chunk(p, blockIdx.x, simt::dynamic_shared<int32_t>(), 1)
                 : Chunk(p, blockIdx.x, p.counts + blockIdx.x, p.num_chunks);
}

// Adds the chunk's slots to its counters. Atomics on integers, so the order in which lanes count
// does not matter.
__device__ __forceinline__ void count(const Params& p, const Chunk& chunk) {
  for (int64_t s = chunk.begin + simt::lane_id(); s < chunk.end; s += 32) {
    const int32_t expert = p.ids[s];
    MERGEME_DEVICE_ASSERT(expert >= 0 && expert < p.num_buckets);
    atomicAdd(chunk.counter(expert), 1);
  }
}

// counts, [B, num_chunks], becomes its own exclusive prefix sum: where the first slot of an expert
// in a chunk goes. offsets[e] is that of chunk 0. One block; each thread owns a stretch of counts:
// it sums the stretch, learns the sum of those before it, and writes the running sum.
__device__ __forceinline__ void scan(const Params& p, int32_t* counts, int64_t num_chunks,
                                     int32_t* sums) {  // [2 * kScanThreads]
  const int64_t size = p.num_buckets * num_chunks, stretch = ceil_div(size, kScanThreads);
  const int64_t begin = threadIdx.x * stretch < size ? threadIdx.x * stretch : size;
  const int64_t end = begin + stretch < size ? begin + stretch : size;
  int32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += counts[i];
  // Inclusive scan over threads; each step reads one half of sums and writes the other.
  int32_t total = sum;
  int from = 0;
  for (unsigned distance = 1; distance < kScanThreads; distance *= 2) {
    sums[from + threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x >= distance) total += sums[from + threadIdx.x - distance];
    from = kScanThreads - from;
  }
  int32_t before = total - sum;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = counts[i];
    counts[i] = before;
    if (i % num_chunks == 0) p.offsets[i / num_chunks] = before;  // the last one: E, if B > E
    before += count;
  }
  if (threadIdx.x == 0 && p.num_buckets == p.num_experts)
    p.offsets[p.num_experts] = static_cast<int32_t>(p.num_slots);
}

// permutation and inverse, stable: a slot's position is where its expert's first slot of this chunk
// goes, plus the number of earlier slots of that expert in the chunk. The warp takes 32 slots at a
// time: lanes with the same expert find one another, count those below them, and the lowest moves
// the counter on for the next 32.
__device__ __forceinline__ void place(const Params& p, const Chunk& chunk) {
  const int64_t lane = simt::lane_id();
  for (int64_t first = chunk.begin; first < chunk.end; first += 32) {
    const int64_t slot = first + lane;
    const int32_t expert = slot < chunk.end ? p.ids[slot] : -1;
    const unsigned same = __match_any_sync(simt::kFullWarp, expert);
    const int32_t rank = __popc(same & ((1u << lane) - 1));
    int32_t position = rank;
    if (expert >= 0) position += *chunk.counter(expert);
    __syncwarp();  // all have read before one writes
    if (expert >= 0) {
      if (rank == 0) *chunk.counter(expert) = position + __popc(same);
      p.permutation[position] = static_cast<int32_t>(slot);
      p.inverse[slot] = position;
    }
    __syncwarp();
  }
}

// counts[e][c] = slots of chunk c whose expert is e. One warp owns a chunk.
template <bool kShared>
__global__ void count_kernel(Params p) {
  simt::begin_overlapped();
  const Chunk chunk = own_chunk<kShared>(p);
  for (int64_t e = threadIdx.x; e < p.num_buckets; e += 32) *chunk.counter(e) = 0;
  __syncwarp();
  count(p, chunk);
  if constexpr (kShared) {
    __syncwarp();
    for (int64_t e = threadIdx.x; e < p.num_buckets; e += 32)
      p.counts[e * p.num_chunks + blockIdx.x] = *chunk.counter(e);
  }
}

__global__ void scan_kernel(Params p) {
  simt::begin_overlapped();
  scan(p, p.counts, p.num_chunks, simt::dynamic_shared<int32_t>());
}

// One warp owns a chunk, whose place in counts says where its slots go.
template <bool kShared>
__global__ void place_kernel(Params p) {
  simt::begin_overlapped();
  const Chunk chunk = own_chunk<kShared>(p);
  if constexpr (kShared)
    for (int64_t e = threadIdx.x; e < p.num_buckets; e += 32)
      *chunk.counter(e) = p.counts[e * p.num_chunks + blockIdx.x];
  __syncwarp();
  place(p, chunk);
}

// Few slots: all of it in one block. Each warp owns a chunk; there is one chunk more, which is
// empty, since with an odd number of them the counters of a warp lie in different banks.
inline constexpr int kSmallWarps = kScanThreads / 32, kSmallChunks = kSmallWarps + 1;

__global__ void small_kernel(Params p) {
  simt::begin_overlapped();
  int32_t* sums = simt::dynamic_shared<int32_t>();  // [2 * kScanThreads], then [B, kSmallChunks]
  int32_t* counts = sums + 2 * kScanThreads;
  const Chunk chunk(p, simt::warp_id(), counts + simt::warp_id(), kSmallChunks);
  for (int64_t i = threadIdx.x; i < p.num_buckets * kSmallChunks; i += kScanThreads) counts[i] = 0;
  __syncthreads();
  count(p, chunk);
  __syncthreads();
  scan(p, counts, kSmallChunks, sums);
  __syncthreads();
  place(p, chunk);
}

// kept_ids[s] = ids[s], or E where its expert is full. One warp owns an expert and looks at its
// slots 32 at a time, in slot order. With priorities it first finds the capacity-th largest key,
// one bit after the other: a bit is set if at least that many keys are not below it. All above that
// key stay, and of those equal to it the first.
template <typename A>
__global__ void drop_kernel(DropParams p) {
  simt::begin_overlapped();
  using Key = key_t<A>;
  const int64_t lane = threadIdx.x;
  const int32_t none = static_cast<int32_t>(p.num_experts);
  for (int64_t s = blockIdx.x * int64_t{32} + lane; s < p.num_slots; s += int64_t{32} * gridDim.x)
    if (p.ids[s] == none) p.kept_ids[s] = none;
  for (int64_t e = blockIdx.x; e < p.num_experts; e += gridDim.x) {
    const int64_t begin = p.offsets[e], end = p.offsets[e + 1];
    const auto key_at = [&](int64_t row) {
      return p.priority == nullptr
                 ? Key(0)
                 : order_key(static_cast<const A*>(p.priority)[p.permutation[row]]);
    };
    const auto count_from = [&](Key least) {
      int64_t count = 0;
      for (int64_t row = begin + lane; row < end; row += 32) count += key_at(row) >= least;
      return int64_t{__reduce_add_sync(simt::kFullWarp, static_cast<int32_t>(count))};
    };
    Key last = std::numeric_limits<Key>::min();  // the lowest key that stays
    int64_t above = 0;                           // slots with a greater one
    if (end - begin > p.capacity && p.priority != nullptr && p.capacity > 0) {
      last = kth_largest<Key>(p.capacity, count_from);
      above = last == std::numeric_limits<Key>::max() ? 0 : count_from(last + 1);
    } else if (p.priority == nullptr) {
      last = 0;
    }
    const int64_t quota = p.capacity - above;  // of those equal to last
    int64_t equal_before = 0;
    const bool all = end - begin <= p.capacity;
    for (int64_t first = begin; first < end; first += 32) {
      const int64_t row = first + lane;
      const Key key = row < end ? key_at(row) : std::numeric_limits<Key>::min();
      const bool equal = row < end && key == last;
      const unsigned equals = __ballot_sync(simt::kFullWarp, equal);
      const int64_t rank = equal_before + __popc(equals & ((1u << lane) - 1));
      equal_before += __popc(equals);
      if (row < end) {
        const bool stays = all || (p.capacity > 0 && (equal ? rank < quota : key > last));
        p.kept_ids[p.permutation[row]] = stays ? static_cast<int32_t>(e) : none;
      }
    }
  }
}

}  // namespace mergeme::sort_by_expert
