#pragma once
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
  for (int64_t e = lane; e < p.num_experts; e += 32) *counter<kShared>(p, e) = 0;
  __syncthreads();  // of one warp
  for (int64_t s = blockIdx.x * p.chunk + lane; s < chunk_end(p); s += 32) {
    const int32_t expert = p.ids[s];
    MERGEME_DEVICE_ASSERT(expert >= 0 && expert < p.num_experts);
    atomicAdd(counter<kShared>(p, expert), 1);
  }
  __syncthreads();
  if constexpr (kShared)
    for (int64_t e = lane; e < p.num_experts; e += 32)
      p.counts[e * p.num_chunks + blockIdx.x] = *counter<kShared>(p, e);
}

// counts becomes its own exclusive prefix sum in the order (expert, chunk): where the first slot of
// an expert in a chunk goes. offsets[e] is that of chunk 0. One block; each thread owns a stretch
// of counts: it sums the stretch, learns the sum of those before it, and writes the running sum.
__global__ void scan_kernel(Params p) {
  int32_t* sums = simt::dynamic_shared<int32_t>();  // [2 * kScanThreads]
  const int64_t size = p.num_experts * p.num_chunks, stretch = ceil_div(size, kScanThreads);
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
    if (i % p.num_chunks == 0) p.offsets[i / p.num_chunks] = before;
    before += count;
  }
  if (threadIdx.x == 0) p.offsets[p.num_experts] = static_cast<int32_t>(p.num_slots);
}

// permutation and inverse, stable: a slot's position is where its expert's first slot of this chunk
// goes, plus the number of earlier slots of that expert in the chunk. One warp owns a chunk and
// takes 32 slots at a time: lanes with the same expert find one another, count those below them,
// and the lowest moves the counter on for the next 32.
template <bool kShared>
__global__ void place_kernel(Params p) {
  const int64_t lane = threadIdx.x;
  if constexpr (kShared)
    for (int64_t e = lane; e < p.num_experts; e += 32)
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

}  // namespace mergeme::sort_by_expert
