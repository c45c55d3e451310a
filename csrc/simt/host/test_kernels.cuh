// Small kernels that python_tests/simt runs on the shim to test the shim itself. They use the
// device abstraction as any kernel does, so nvcc compiles them too. Those named bad_* are wrong on
// purpose.
#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"
#include "csrc/simt/device.cuh"
#include "csrc/simt/mma.cuh"

namespace mergeme::simt::testing {

struct Params {
  const void* in;
  void* out;
  int64_t n;  // the kernel's variant or size
};

// The thread's number in the grid.
__device__ __forceinline__ int64_t global_rank() {
  const int64_t block =
      blockIdx.x + int64_t{gridDim.x} * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
  return block * blockDim.x * blockDim.y * blockDim.z + thread_rank();
}

// out[rank] = blockIdx, threadIdx, lane, warp: [threads, 8] uint32.
__global__ void place_kernel(Params p) {
  auto* out = static_cast<uint32_t*>(p.out) + 8 * global_rank();
  const uint32_t row[8] = {blockIdx.x,  blockIdx.y,  blockIdx.z, threadIdx.x,
                           threadIdx.y, threadIdx.z, lane_id(),  warp_id()};
  for (int i = 0; i < 8; ++i) out[i] = row[i];
}

// out[global_rank] = which thread of the grid ran this piece as the how-manieth, n pieces each,
// parted by barriers: shows the schedule. The counter is in[0]; one thread at a time runs here.
__global__ void order_kernel(Params p) {
  auto* counter = static_cast<uint32_t*>(const_cast<void*>(p.in));
  auto* out = static_cast<uint32_t*>(p.out);
  for (int64_t i = 0; i < p.n; ++i) {
    out[atomicAdd(counter, 1u)] = static_cast<uint32_t>(global_rank());
    __syncthreads();
  }
}

// out = sum of in over the block by a tree in shared memory, [1] float. n = 1 leaves the barrier
// between the steps out, n = 2 the initialisation of the upper half.
__global__ void block_sum_kernel(Params p) {
  float* sums = dynamic_shared<float>();
  const unsigned i = thread_rank();
  if (p.n != 2 || i < blockDim.x / 2) sums[i] = static_cast<const float*>(p.in)[i];
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (i < half) sums[i] += sums[i + half];
    if (p.n != 1) __syncthreads();
  }
  if (i == 0) *static_cast<float*>(p.out) = sums[0];
}

// out[i] = __syncthreads_count, _or, _and of in[i] (int32), twice: [threads, 2, 3] int32.
__global__ void block_votes_kernel(Params p) {
  const int vote = static_cast<const int32_t*>(p.in)[thread_rank()];
  auto* out = static_cast<int32_t*>(p.out) + 6 * thread_rank();
  for (int i = 0; i < 2; ++i) {
    out[3 * i] = __syncthreads_count(i == 0 ? vote : !vote);
    out[3 * i + 1] = __syncthreads_or(i == 0 ? vote : 0);
    out[3 * i + 2] = __syncthreads_and(i == 0 ? vote : 1);
  }
}

// Each lane's results of every warp call on in[lane] (uint32): [threads, 24] uint32. Lanes at or
// beyond n of each warp stay out, and the masks name the lanes below n.
__global__ void warp_calls_kernel(Params p) {
  if (lane_id() >= p.n) return;
  const unsigned mask = p.n == 32 ? kFullWarp : (1u << p.n) - 1;
  const uint32_t v = static_cast<const uint32_t*>(p.in)[thread_rank()];
  const auto s = static_cast<int32_t>(v);
  auto* out = static_cast<uint32_t*>(p.out) + 24 * thread_rank();
  int i = 0;
  out[i++] = __shfl_sync(mask, v, 3);
  out[i++] = __shfl_sync(mask, v, static_cast<int>(lane_id()) + 5, 8);
  out[i++] = __shfl_xor_sync(mask, v, 1);
  out[i++] = __shfl_xor_sync(mask, v, 6, 4);
  out[i++] = __shfl_down_sync(mask, v, 1);
  out[i++] = __shfl_down_sync(mask, v, 3, 8);
  out[i++] = __shfl_up_sync(mask, v, 1);
  out[i++] = __shfl_up_sync(mask, v, 3, 8);
  out[i++] = bits_of(__shfl_xor_sync(mask, static_cast<float>(s), 1));
  const double wide = __shfl_xor_sync(mask, static_cast<double>(s) / 3, 1);
  uint32_t halves[2];
  memcpy(halves, &wide, 8);
  out[i++] = halves[0];
  out[i++] = halves[1];
  out[i++] = __ballot_sync(mask, v % 3 == 0);
  out[i++] = static_cast<uint32_t>(__any_sync(mask, v == 7));
  out[i++] = static_cast<uint32_t>(__all_sync(mask, v != 7));
  out[i++] = __match_any_sync(mask, v % 4);
  out[i++] = __match_any_sync(mask, static_cast<unsigned long long>(v % 4) << 40);
  out[i++] = __reduce_add_sync(mask, v);
  out[i++] = __reduce_max_sync(mask, v);
  out[i++] = __reduce_min_sync(mask, v);
  out[i++] = static_cast<uint32_t>(__reduce_add_sync(mask, s));
  out[i++] = static_cast<uint32_t>(__reduce_max_sync(mask, s));
  out[i++] = static_cast<uint32_t>(__reduce_min_sync(mask, s));
  __syncwarp(mask);
  out[i++] = static_cast<uint32_t>(__popc(v) | __ffs(s) << 8 | __clz(s) << 16);
  const auto far = static_cast<unsigned long long>(v) << 20;
  out[i++] = static_cast<uint32_t>(__popcll(far) | __ffsll(static_cast<long long>(far)) << 8 |
                                   __clzll(static_cast<long long>(far)) << 16);
}

// Lane 0's fma in float and double of three numbers: in [3] double, out [2] double.
__global__ void fma_kernel(Params p) {
  const auto* x = static_cast<const double*>(p.in);
  auto* out = static_cast<double*>(p.out);
  out[0] = fma(static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]));
  out[1] = fma(x[0], x[1], x[2]);
}

// Every thread adds in[thread] (int32) to the three counters: out int32, uint32, padding, uint64.
// The old values that a thread saw are dropped.
__global__ void atomics_kernel(Params p) {
  const int32_t v = static_cast<const int32_t*>(p.in)[global_rank()];
  auto* out = static_cast<uint32_t*>(p.out);
  atomicAdd(static_cast<int*>(p.out), v);
  atomicAdd(out + 1, static_cast<uint32_t>(v));
  atomicAdd(static_cast<unsigned long long*>(p.out) + 1,
            static_cast<unsigned long long>(int64_t{v}));
}

// d += a b with one warp. In: a [32][4], b [32][2] uint32 and d [32][4] float, by lane; out: d.
template <typename T>
__global__ void mma_kernel(Params p) {
  const auto* in = static_cast<const uint32_t*>(p.in);
  const unsigned l = lane_id();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = in[4 * l + i];
  for (int i = 0; i < 2; ++i) b[i] = in[128 + 2 * l + i];
  for (int i = 0; i < 4; ++i) d[i] = float_of(in[192 + 4 * l + i]);
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) static_cast<float*>(p.out)[4 * l + i] = d[i];
}

// out[i] = in[i], 16 bytes each, n bytes off.
__global__ void store_16_kernel(Params p) {
  const auto* in = static_cast<const uint32_t*>(p.in) + 4 * thread_rank();
  store_16(static_cast<unsigned char*>(p.out) + p.n + 16 * thread_rank(),
           {in[0], in[1], in[2], in[3]});
}

// out[i] = the two floats in[2 i] and in[2 i + 1] rounded side by side, and each of them as a float
// again: [threads, 3] uint32.
template <typename T>
__global__ void round_pair_kernel(Params p) {
  const auto* in = static_cast<const float*>(p.in);
  auto* out = static_cast<uint32_t*>(p.out) + 3 * thread_rank();
  out[0] = round_pair<T>(in[2 * thread_rank()], in[2 * thread_rank() + 1]);
  for (int i = 0; i < 2; ++i) out[1 + i] = bits_of(of_pair<T>(out[0], i));
}

// In: each lane's byte offset [32] int32, then n bytes for shared memory. Out: [32][Count] uint32.
template <int Count, bool Transpose>
__global__ void ldmatrix_kernel(Params p) {
  const auto* offsets = static_cast<const int32_t*>(p.in);
  const auto* bytes = static_cast<const unsigned char*>(p.in) + 128;
  auto* shared = dynamic_shared<unsigned char>();
  for (int64_t i = lane_id(); i < p.n; i += 32) shared[i] = bytes[i];
  __syncthreads();
  uint32_t r[Count];
  const void* row = shared + offsets[lane_id()];
  if constexpr (Count == 4 && Transpose) ldmatrix_x4_trans(r, row);
  if constexpr (Count == 4 && !Transpose) ldmatrix_x4(r, row);
  if constexpr (Count == 2 && Transpose) ldmatrix_x2_trans(r, row);
  if constexpr (Count == 2 && !Transpose) ldmatrix_x2(r, row);
  for (int i = 0; i < Count; ++i) static_cast<uint32_t*>(p.out)[Count * lane_id() + i] = r[i];
}

// One group of copies per tile, `Depth` tiles in shared memory, n tiles in all; out = in with the
// neighbour's 16 bytes, so that the barrier counts. The last thread copies zeros instead.
//   Wait: groups that may be under way when a tile is read; Depth - 1 is right, more is too early.
//   Barrier: whether threads wait for one another before reading.
template <int Depth, int Wait, bool Barrier>
__global__ void copy_pipeline_kernel(Params p) {
  uint4* tiles = dynamic_shared<uint4>();
  const auto* in = static_cast<const uint4*>(p.in);
  auto* out = static_cast<uint4*>(p.out);
  const unsigned i = threadIdx.x, size = blockDim.x;
  const auto fetch = [&](int64_t tile) {
    if (tile < p.n)
      cp_async_16(&tiles[tile % Depth * size + i], &in[tile * size + i], i + 1 < size);
    cp_async_commit();
  };
  for (int64_t tile = 0; tile < Depth; ++tile) fetch(tile);
  for (int64_t tile = 0; tile < p.n; ++tile) {
    cp_async_wait<Wait>();
    if (Barrier) __syncthreads();
    out[tile * size + i] = tiles[tile % Depth * size + (i + 1) % size];
    __syncthreads();
    fetch(tile + Depth);
  }
}

// From here on wrong on purpose; n chooses the thread or the variant

// Reads past shared memory's initialised part.
__global__ void bad_uninitialised_kernel(Params p) {
  static_cast<uint32_t*>(p.out)[threadIdx.x] = dynamic_shared<uint32_t>()[threadIdx.x];
}
__global__ void bad_assert_kernel(Params p) { MERGEME_DEVICE_ASSERT(global_rank() != p.n); }
__global__ void bad_leave_kernel(Params p) {
  if (threadIdx.x == p.n) return;
  __syncthreads();
}
__global__ void bad_two_barriers_kernel(Params p) {
  if (threadIdx.x == p.n) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void bad_barrier_and_warp_kernel(Params) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
// Mask: without the caller; of lanes that left; of lanes that the block does not have; of two
// kinds.
__global__ void bad_mask_kernel(Params p) {
  if (p.n == 0) __syncwarp(0xfffffffeu);
  if (p.n == 1 && threadIdx.x != 5) __syncwarp();
  if (p.n == 2) __syncwarp(kFullWarp);  // launched with 40 threads
  if (p.n == 3) __syncwarp(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u);
  if (p.n == 4) __syncwarp(threadIdx.x < 16 ? 0xffffffffu : 0xffff8000u);
}
__global__ void bad_two_calls_kernel(Params) {
  if (threadIdx.x < 16) {
    __ballot_sync(kFullWarp, 1);
  } else {
    __any_sync(kFullWarp, 1);
  }
}
// Shuffles half a warp from lanes outside the mask.
__global__ void bad_shuffle_kernel(Params p) {
  if (threadIdx.x >= 16) return;
  static_cast<float*>(p.out)[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}
__global__ void bad_shared_store_kernel(Params p) { dynamic_shared<unsigned char>()[p.n] = 1; }
__global__ void bad_global_store_kernel(Params p) {
  static_cast<unsigned char*>(p.out)[p.n + threadIdx.x] = 1;
}
__global__ void bad_overflow_kernel(Params p) {
  const auto x = static_cast<int32_t>(p.n);
  static_cast<int32_t*>(p.out)[0] = x + x;
}
__global__ void bad_alignment_kernel(Params p) {
  auto* at = static_cast<unsigned char*>(p.out) + 1;
  *reinterpret_cast<uint32_t*>(at) = 1;
}
// Reads a variable of a scope that was left, after another thread has run.
__global__ void bad_dangling_kernel(Params p) {
  volatile uint32_t* stale = nullptr;
  {
    volatile uint32_t value = threadIdx.x;
    stale = &value;
    __syncthreads();
  }
  static_cast<uint32_t*>(p.out)[threadIdx.x] = *stale;
}
// Copies: misaligned source, misaligned destination, destination outside shared memory.
__global__ void bad_copy_kernel(Params p) {
  auto* shared = dynamic_shared<unsigned char>();
  const auto* in = static_cast<const unsigned char*>(p.in);
  if (p.n == 0) cp_async_16(shared, in + 8);
  if (p.n == 1) cp_async_16(shared + 4, in);
  if (p.n == 2) cp_async_16(p.out, in);
}
// Overflows the stack of thread n.
__device__ inline uint32_t deep(uint32_t levels) {
  volatile uint32_t frame[256];
  frame[levels % 256] = levels;
  return levels == 0 ? frame[0] : deep(levels - 1) + frame[levels % 256];
}
__global__ void stack_kernel(Params p) {
  __syncthreads();
  static_cast<uint32_t*>(p.out)[threadIdx.x] = deep(static_cast<uint32_t>(p.n));
}

}  // namespace mergeme::simt::testing
