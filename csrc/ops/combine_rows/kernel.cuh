#pragma once
#include "csrc/common/runs.cuh"
#include "csrc/ops/combine_rows/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::combine_rows {

// out = base + sum_m weights[group, m] * (tensors[m] - base), in index order. A thread owns a run
// of 8 elements, grid-stride; runs are disjoint, so no write races.
template <typename T>
__global__ void combine_rows_kernel(Params p) {
  using Acc = acc_t<T>;
  const int64_t runs = ceil_div(p.numel, kRun);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < runs; r += step) {
    const int64_t start = r * kRun;
    const Run run(start, p.numel, p.aligned);
    const double* weights[kRun];  // each element's row
    const int64_t row = (p.offset + start) / p.row_length;
    int64_t group = row, column = p.offset + start - row * p.row_length;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      const int64_t taken = p.axis == Axis::kAll ? 0 : p.axis == Axis::kRow ? group : column;
      weights[e] = p.weights + (start + e < p.numel ? taken : 0) * p.num_models;
      if (++column == p.row_length) {
        column = 0;
        ++group;
      }
    }
    Acc base[kRun] = {}, sum[kRun] = {}, x[kRun] = {};
    if (p.base) run.load(static_cast<const T*>(p.base), base);
    for (int64_t m = 0; m < p.num_models; ++m) {
      run.load(static_cast<const T*>(p.tensors[m]), x);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const Acc delta = p.base ? x[e] - base[e] : x[e];
        sum[e] += static_cast<Acc>(weights[e][m]) * delta;
      }
    }
    if (p.base) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) sum[e] = base[e] + sum[e];
    }
    run.store(sum, static_cast<T*>(p.out));
  }
}

}  // namespace mergeme::combine_rows
