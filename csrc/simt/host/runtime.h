// Host-side SIMT: runs a kernel body as C++, one fiber per CUDA thread. Test-only.
#pragma once
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// __shared__ is left undefined on purpose: kernels use simt::dynamic_shared<T>().

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};

namespace mergeme::simt::host {
enum class Schedule { kForward, kReverse, kShuffled };
void set_schedule(Schedule schedule, uint64_t seed);
void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& thread);
void sync_block();
std::array<uint64_t, 32> exchange_warp(unsigned mask, uint64_t value);
void* shared_base();
[[noreturn]] void fail(const std::string& what);
}  // namespace mergeme::simt::host

namespace mergeme::simt {
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(host::shared_base());
}
}  // namespace mergeme::simt
#define MERGEME_DEVICE_ASSERT(cond) \
  ((cond) ? void(0) : ::mergeme::simt::host::fail("device assert: " #cond))

inline void __syncthreads() { mergeme::simt::host::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { mergeme::simt::host::exchange_warp(mask, 0); }
inline unsigned lane_id_() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31u;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask) {
  static_assert(sizeof(T) <= 8);
  uint64_t w = 0;
  memcpy(&w, &v, sizeof(T));
  const auto all = mergeme::simt::host::exchange_warp(mask, w);
  T out;
  memcpy(&out, &all[lane_id_() ^ unsigned(lane_mask)], sizeof(T));
  return out;
}
inline unsigned __ballot_sync(unsigned mask, int pred) {
  const auto all = mergeme::simt::host::exchange_warp(mask, pred ? 1 : 0);
  unsigned r = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1u) && all[i]) r |= 1u << i;
  return r;
}
template <typename T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
