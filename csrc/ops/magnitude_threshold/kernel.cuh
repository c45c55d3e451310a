#pragma once
#include "csrc/ops/magnitude_threshold/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::magnitude_threshold {

inline constexpr int kThreads = 256;
static_assert(kBins % kThreads == 0);

template <typename T>
__device__ __forceinline__ magnitude_t<acc_t<T>> bits_at(const Params& p, const T* tensor,
                                                         int64_t i) {
  return magnitude_bits(to_acc(tensor[i]) - to_acc(static_cast<const T*>(p.base)[i]));
}

// states[m] = nothing known yet; histogram = 0. One thread per bin, grid-stride: no write races.
__global__ void start_kernel(Params p) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.num_models * kBins;
       i += step) {
    p.histogram[i] = 0;
    if (i < p.num_models) p.states[i] = {0, p.keep[i]};
  }
}

// histogram[m, d] += number of elements that share the digits found so far and have digit d next.
// Blocks stride over the elements (x) and the models (y); each counts in shared memory and adds its
// counts with integer atomics, whose order cannot show.
template <typename T>
__global__ void histogram_kernel(Params p) {
  auto* counts = simt::dynamic_shared<unsigned>();  // [kBins]; a block sees < 2^32 elements
  const unsigned mask = (1u << p.digit_bits) - 1;
  const int known = p.shift + p.digit_bits;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t m = blockIdx.y; m < p.num_models; m += gridDim.y) {
    for (int b = threadIdx.x; b < kBins; b += kThreads) counts[b] = 0;  // those it adds below
    __syncthreads();
    const T* tensor = static_cast<const T*>(p.tensors[m]);
    const uint64_t prefix = p.states[m].bits >> known;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numel; i += step) {
      const auto bits = bits_at(p, tensor, i);
      if ((bits >> known) == prefix) atomicAdd(&counts[unsigned(bits >> p.shift) & mask], 1u);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kThreads)
      if (counts[b]) atomicAdd(&p.histogram[m * kBins + b], Count{counts[b]});
  }
}

// Appends to states[m] the digit of the rank-th largest element, and clears the histogram for the
// next pass. One block per model; a thread sums neighbouring bins, thread 0 walks the sums.
__global__ void pick_kernel(Params p) {
  constexpr int kOwn = kBins / kThreads;
  auto* sums = simt::dynamic_shared<Count>();  // [kThreads], the highest digits first
  for (int64_t m = blockIdx.x; m < p.num_models; m += gridDim.x) {
    Count* bins = p.histogram + m * kBins;
    Count sum = 0;
    for (int b = 0; b < kOwn; ++b) sum += bins[kBins - 1 - (int(threadIdx.x) * kOwn + b)];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0 && p.states[m].rank > 0) {
      auto rank = Count(p.states[m].rank);
      int t = 0;
      while (sums[t] < rank) rank -= sums[t++];
      int digit = kBins - 1 - t * kOwn;
      while (bins[digit] < rank) rank -= bins[digit--];
      p.states[m] = {p.states[m].bits | uint64_t(digit) << p.shift, int64_t(rank)};
    }
    __syncthreads();  // thread 0 is done with the bins and the sums
    for (int b = 0; b < kOwn; ++b) bins[int(threadIdx.x) * kOwn + b] = 0;
  }
}

// equal[m, t] = how many elements of tile t equal the threshold. Blocks stride over the tiles (x)
// and the models (y).
template <typename T>
__global__ void count_equal_kernel(Params p) {
  auto* count = simt::dynamic_shared<unsigned>();  // [1]; a tile has < 2^32 elements
  const int64_t tiles = ceil_div(p.numel, p.tile);
  for (int64_t m = blockIdx.y; m < p.num_models; m += gridDim.y)
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      if (threadIdx.x == 0) *count = 0;  // it has read the last tile's
      __syncthreads();
      const T* tensor = static_cast<const T*>(p.tensors[m]);
      const int64_t end = (t + 1) * p.tile < p.numel ? (t + 1) * p.tile : p.numel;
      unsigned mine = 0;
      for (int64_t i = t * p.tile + threadIdx.x; i < end; i += kThreads)
        mine += bits_at(p, tensor, i) == p.states[m].bits;
      if (mine) atomicAdd(count, mine);
      __syncthreads();
      if (threadIdx.x == 0) p.equal[m * tiles + t] = *count;
    }
}

// out[m] = (threshold, index after the rank-th element that equals it). One block per model: the
// tile from the counts, then the thread's stretch of the tile, then the element. A threshold of NaN
// means that NaNs alone fill the count: they are kept anyway, so the cut lies above infinity.
template <typename T>
__global__ void locate_kernel(Params p) {
  using Acc = acc_t<T>;
  struct Found {
    int64_t tile, rank;
  };
  auto* sums = simt::dynamic_shared<int64_t>();             // [kThreads]
  auto* found = reinterpret_cast<Found*>(sums + kThreads);  // [1]
  const int64_t tiles = ceil_div(p.numel, p.tile);
  const int64_t own_tiles = ceil_div(tiles, kThreads), own = ceil_div(p.tile, kThreads);
  for (int64_t m = blockIdx.x; m < p.num_models; m += gridDim.x) {
    const State state = p.states[m];
    if (state.rank == 0 || state.bits > Magnitude<Acc>::kInfinity) {  // the same for all threads
      if (threadIdx.x == 0) {
        p.out[2 * m] = static_cast<double>(magnitude_of(Magnitude<Acc>::kInfinity));
        p.out[2 * m + 1] = 0;
      }
      continue;
    }
    const int64_t* equal = p.equal + m * tiles;
    int64_t sum = 0;
    for (int64_t t = threadIdx.x * own_tiles; t < (threadIdx.x + 1) * own_tiles && t < tiles; ++t)
      sum += equal[t];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t rank = state.rank, s = 0;
      while (sums[s] < rank) rank -= sums[s++];
      int64_t t = s * own_tiles;
      while (equal[t] < rank) rank -= equal[t++];
      *found = {t, rank};
    }
    __syncthreads();
    const T* tensor = static_cast<const T*>(p.tensors[m]);
    const int64_t begin = found->tile * p.tile + threadIdx.x * own;
    int64_t end = begin + own;
    if (end > (found->tile + 1) * p.tile) end = (found->tile + 1) * p.tile;
    if (end > p.numel) end = p.numel;
    sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += bits_at(p, tensor, i) == state.bits;
    sums[threadIdx.x] = sum;
    __syncthreads();
    int64_t rank = found->rank;
    for (unsigned t = 0; t < threadIdx.x; ++t) rank -= sums[t];
    if (rank > 0 && rank <= sum) {  // one thread only
      int64_t i = begin;
      for (;; ++i)
        if (bits_at(p, tensor, i) == state.bits && --rank == 0) break;
      p.out[2 * m] = static_cast<double>(magnitude_of(magnitude_t<Acc>(state.bits)));
      p.out[2 * m + 1] = static_cast<double>(i + 1);
    }
    __syncthreads();  // before the next model overwrites the sums
  }
}

}  // namespace mergeme::magnitude_threshold
