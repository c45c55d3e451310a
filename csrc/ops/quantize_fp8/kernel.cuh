#pragma once
#include "csrc/ops/quantize_fp8/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::quantize_fp8 {

inline constexpr int kThreads = 256;

// scale[s, b] = max |x| / 448 over block b of row s, q = x / scale. A warp owns one block of 128
// elements at a time, four in each lane; blocks are disjoint, so no write races.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_fp8_kernel(Params p) {
  constexpr int kOwn = kScaleBlock / simt::kWarpSize;
  const T* x = static_cast<const T*>(p.x);
  const int64_t step = int64_t{gridDim.x} * (kThreads / simt::kWarpSize);
  const int64_t first = int64_t{blockIdx.x} * (kThreads / simt::kWarpSize) + simt::warp_id();
  for (int64_t i = first; i < p.num_rows * p.blocks; i += step) {
    const int64_t row = i / p.blocks, column = i % p.blocks * kScaleBlock + simt::lane_id();
    const int64_t start = row * p.columns;
    float own[kOwn];
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t k = column + j * int{simt::kWarpSize};
      own[j] = k < p.columns ? to_acc(x[start + k]) : 0.f;
      const uint32_t magnitude = scale_magnitude(own[j]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = scale_of(float_of(__reduce_max_sync(simt::kFullWarp, largest)));
    if (simt::lane_id() == 0) p.scale[i] = scale;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t k = column + j * int{simt::kWarpSize};
      if (k < p.columns) p.q[start + k] = from_acc<float8_e4m3_t>(own[j] / scale);
    }
  }
}

}  // namespace mergeme::quantize_fp8
