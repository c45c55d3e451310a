#pragma once
#include "csrc/common/runs.cuh"
#include "csrc/ops/weighted_sum/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::weighted_sum {

// out = sum_m weights[m] * tensors[m], in index order. A thread owns a run of 8 elements,
// grid-stride; runs are disjoint, so no write races.
template <typename T>
__global__ void weighted_sum_kernel(Params p) {
  using Acc = acc_t<T>;
  const int64_t runs = ceil_div(p.numel, kRun);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < runs; r += step) {
    const Run run(r * kRun, p.numel, p.aligned);
    Acc sum[kRun] = {}, x[kRun] = {};
    for (int64_t m = 0; m < p.num_models; ++m) {
      const Acc weight = static_cast<Acc>(p.weights[m]);
      run.load(static_cast<const T*>(p.tensors[m]), x);
#pragma unroll
      for (int e = 0; e < kRun; ++e) sum[e] += weight * x[e];
    }
    run.store(sum, static_cast<T*>(p.out));
  }
}

}  // namespace mergeme::weighted_sum
