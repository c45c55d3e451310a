// A thread's run of 8 consecutive elements, read and written 16 bytes at a time where that is
// possible. Torch-free.
#pragma once
#include "csrc/common/numeric.h"
#include "csrc/simt/device.cuh"

namespace mergeme {

inline constexpr int kRun = 8;

class Run {
 public:
  // Elements start to start + 7, as far as they lie in [0, numel). `aligned` promises that every
  // array begins at a multiple of 16 bytes and that start is a multiple of 8.
  __device__ __forceinline__ Run(int64_t start, int64_t numel, bool aligned)
      : start_(start),
        low_(start < 0 ? int(-start) : 0),
        high_(numel - start < kRun ? int(numel - start) : kRun),
        whole_(aligned && low_ == 0 && high_ == kRun) {}

  // to[e] = from[start + e], widened; entries outside the array are left as they are.
  template <typename T>
  __device__ __forceinline__ void load(const T* from, acc_t<T>* to) const {
    if (whole_) {
      constexpr int kItems = 16 / sizeof(T);
#pragma unroll
      for (int c = 0; c < kRun / kItems; ++c) {
        const Chunk chunk = reinterpret_cast<const Chunk*>(from + start_)[c];
        T item[kItems];
        memcpy(item, &chunk, 16);
#pragma unroll
        for (int e = 0; e < kItems; ++e) to[c * kItems + e] = to_acc(item[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (e >= low_ && e < high_) to[e] = to_acc(from[start_ + e]);
    }
  }

  // to[start + e] = from[e], rounded once.
  template <typename T>
  __device__ __forceinline__ void store(const acc_t<T>* from, T* to) const {
    if (whole_) {
      constexpr int kItems = 16 / sizeof(T);
#pragma unroll
      for (int c = 0; c < kRun / kItems; ++c) {
        T item[kItems];
#pragma unroll
        for (int e = 0; e < kItems; ++e) item[e] = from_acc<T>(from[c * kItems + e]);
        Chunk chunk;
        memcpy(&chunk, item, 16);
        reinterpret_cast<Chunk*>(to + start_)[c] = chunk;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (e >= low_ && e < high_) to[start_ + e] = from_acc<T>(from[e]);
    }
  }

 private:
  struct alignas(16) Chunk {
    uint32_t w[4];
  };
  int64_t start_;
  int low_, high_;
  bool whole_;
};

}  // namespace mergeme
