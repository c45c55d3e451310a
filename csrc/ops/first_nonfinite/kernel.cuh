#pragma once
#include "csrc/common/runs.cuh"
#include "csrc/ops/first_nonfinite/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::first_nonfinite {

// The least of the block's values, for thread 0. `shared` holds one for each thread.
__device__ __forceinline__ int64_t least_of_block(int64_t mine, int64_t* shared) {
  shared[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    simt::sync_before_folding(half);
    const int other = int(threadIdx.x) + half;
    if (int(threadIdx.x) < half && shared[other] < shared[threadIdx.x])
      shared[threadIdx.x] = shared[other];
  }
  return shared[0];
}

// partials[b] = the first index, of those that block b looks at, with a NaN or an infinity. A
// thread looks at runs of 8 elements, grid-stride, up to the first it finds.
template <typename T>
__global__ void find_kernel(Params p) {
  using Acc = acc_t<T>;
  const int64_t runs = ceil_div(p.numel, kRun);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t first = kNone;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < runs && first == kNone;
       r += step) {
    Acc x[kRun] = {};  // what lies beyond the end stays finite
    Run(r * kRun, p.numel, p.aligned).load(static_cast<const T*>(p.tensor), x);
#pragma unroll
    for (int e = kRun - 1; e >= 0; --e)
      if (magnitude_bits(x[e]) >= Magnitude<Acc>::kInfinity) first = r * kRun + e;
  }
  const int64_t least = least_of_block(first, simt::dynamic_shared<int64_t>());
  if (threadIdx.x == 0) p.partials[blockIdx.x] = least;
}

// out = the least of the partials, or -1. One block.
__global__ void finish_kernel(Params p) {
  int64_t first = kNone;
  for (int64_t b = threadIdx.x; b < p.blocks; b += kThreads)
    if (p.partials[b] < first) first = p.partials[b];
  const int64_t least = least_of_block(first, simt::dynamic_shared<int64_t>());
  if (threadIdx.x == 0) *p.out = least == kNone ? -1 : least;
}

}  // namespace mergeme::first_nonfinite
