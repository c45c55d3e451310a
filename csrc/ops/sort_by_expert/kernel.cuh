#pragma once
#include "csrc/common/order_key.h"
#include "csrc/ops/sort_by_expert/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::sort_by_expert {

inline constexpr int kScanThreads = 512;

// A warp's counters, one for each expert: in shared memory, or, for more experts than fit there, in
// the chunk's own column of counts.
template <bool kShared>
__device__ __forceinline__ int32_t* counter(const Params& p, int64_t expert) {
  if constexpr (kShared)
    return simt::dynamic_shared<int32_t>() + expert;
  else
    return p.counts + expert * p.num_chunks + blockIdx.x;
}

__device__ __forceinline__ int64_t chunk_end(const Params& p) {
  const int64_t end = (blockIdx.x + int64_t{1}) * p.chunk;
  return end < p.num_slots ? end : p.num_slots;
}

// counts[e][c] = slots of chunk c whose expert is e. One warp owns a chunk. Atomics on integers, so
// the order in which lanes count does not matter.
template <bool kShared>
__global__ void count_kernel(Params p) {
  const int64_t lane = threadIdx.x;
  for (int64_t e = lane; e < p.num_buckets; e += 32) *counter<kShared>(p, e) = 0;
  __syncthreads();  // of one warp
  for (int64_t s = blockIdx.x * p.chunk + lane; s < chunk_end(p); s += 32) {
    const int32_t expert = p.ids[s];
    MERGEME_DEVICE_ASSERT(expert >= 0 && expert < p.num_buckets);
    atomicAdd(counter<kShared>(p, expert), 1);
  }
  __syncthreads();
  if constexpr (kShared)
    for (int64_t e = lane; e < p.num_buckets; e += 32)
      p.counts[e * p.num_chunks + blockIdx.x] = *counter<kShared>(p, e);
}

// counts becomes its own exclusive prefix sum in the order (expert, chunk): where the first slot of
// an expert in a chunk goes. offsets[e] is that of chunk 0. One block; each thread owns a stretch
// of counts: it sums the stretch, learns the sum of those before it, and writes the running sum.
__global__ void scan_kernel(Params p) {
  int32_t* sums = simt::dynamic_shared<int32_t>();  // [2 * kScanThreads]
  const int64_t size = p.num_buckets * p.num_chunks, stretch = ceil_div(size, kScanThreads);
  const int64_t begin = threadIdx.x * stretch < size ? threadIdx.x * stretch : size;
  const int64_t end = begin + stretch < size ? begin + stretch : size;
  int32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += p.counts[i];
  // Inclusive scan over threads; each step reads one half of sums and writes the other.
  int32_t total = sum;
  int from = 0;
  sums[threadIdx.x] = total;
  __syncthreads();
  for (unsigned distance = 1; distance < kScanThreads; distance *= 2) {
    if (threadIdx.x >= distance) total += sums[from + threadIdx.x - distance];
    from = kScanThreads - from;
    sums[from + threadIdx.x] = total;
    __syncthreads();
  }
  int32_t before = total - sum;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = p.counts[i];
    p.counts[i] = before;
    if (i % p.num_chunks == 0) p.offsets[i / p.num_chunks] = before;  // the last one: E, if B > E
    before += count;
  }
  if (threadIdx.x == 0 && p.num_buckets == p.num_experts)
    p.offsets[p.num_experts] = static_cast<int32_t>(p.num_slots);
}

// permutation and inverse, stable: a slot's position is where its expert's first slot of this chunk
// goes, plus the number of earlier slots of that expert in the chunk. One warp owns a chunk and
// takes 32 slots at a time: lanes with the same expert find one another, count those below them,
// and the lowest moves the counter on for the next 32.
template <bool kShared>
__global__ void place_kernel(Params p) {
  const int64_t lane = threadIdx.x;
  if constexpr (kShared)
    for (int64_t e = lane; e < p.num_buckets; e += 32)
      *counter<kShared>(p, e) = p.counts[e * p.num_chunks + blockIdx.x];
  __syncthreads();  // of one warp
  const int64_t begin = blockIdx.x * p.chunk, end = chunk_end(p);
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t slot = first + lane;
    const int32_t expert = slot < end ? p.ids[slot] : -1;
    const unsigned same = __match_any_sync(simt::kFullWarp, expert);
    const int32_t rank = __popc(same & ((1u << lane) - 1));
    int32_t position = rank;
    if (expert >= 0) position += *counter<kShared>(p, expert);
    __syncthreads();  // all have read before one writes
    if (expert >= 0) {
      if (rank == 0) *counter<kShared>(p, expert) = position + __popc(same);
      p.permutation[position] = static_cast<int32_t>(slot);
      p.inverse[slot] = position;
    }
    __syncthreads();
  }
}

// kept_ids[s] = ids[s], or E where its expert is full. One warp owns an expert and looks at its
// slots 32 at a time, in slot order. With priorities it first finds the capacity-th largest key,
// one bit after the other: a bit is set if at least that many keys are not below it. All above that
// key stay, and of those equal to it the first.
template <typename A>
__global__ void drop_kernel(DropParams p) {
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
      constexpr int kBits = 8 * sizeof(Key);
      if (count_from(0) >= p.capacity) last = 0;
      for (int bit = kBits - 2; bit >= 0; --bit) {
        const Key higher = last | (Key(1) << bit);
        if (count_from(higher) >= p.capacity) last = higher;
      }
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
