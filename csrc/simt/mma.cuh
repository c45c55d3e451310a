// Asynchronous copies and tensor cores of sm_80, each instruction wrapped once: inline PTX for the
// device, a strict meaning for the host shim. Torch-free.
//
// Fragment layouts, lane = 4 * group + thread (PTX ISA, "Matrix Fragments for mma.m16n8k16"); each
// 32-bit register holds two neighbouring elements, the lower index in the lower half:
//   a[0] A[group][2 * thread, +1]    a[1] A[group + 8][same]
//   a[2] A[group][2 * thread + 8]    a[3] A[group + 8][2 * thread + 8]       A is 16 x 16, M x K
//   b[0] B[2 * thread, +1][group]    b[1] B[2 * thread + 8, +1][group]       B is 16 x 8,  K x N
//   d[0], d[1] D[group][2 * thread, +1]   d[2], d[3] D[group + 8][same]      D is 16 x 8,  M x N
// ldmatrix gives lane l the elements [l / 4][2 * (l % 4), +1] of each 8 x 8 matrix, so a row-major
// A tile is loaded by ldmatrix_x4 and a B tile that lies row by row along K by ldmatrix_x2_trans;
// one that lies along N (B^T row-major) by ldmatrix_x2.
#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"
#include "csrc/simt/device.cuh"

#if !defined(__CUDACC__)
#include "csrc/simt/host/mma.h"
#endif

namespace mergeme::simt {

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Begins a copy of 16 bytes from global to shared memory, past L1; if not `valid`, of 16 zeros, and
// `global` is not read. Both addresses are multiples of 16. The bytes are there for the calling
// thread after the cp_async_wait that covers their group, for others after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  host::copy_async(shared, global, valid);
#endif
}

// Makes one group of the calling thread's copies since the last commit; it may be empty.
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::copy_commit();
#endif
}

// Waits until at most the N most recent groups of the calling thread are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(N >= 0);
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  host::copy_wait(N);
#endif
}

// Loads 8 x 8 matrices of 16-bit elements from shared memory with all 32 lanes. Lane 8 i + j gives
// the address of row j of matrix i, 16 bytes at a multiple of 16; r[i] receives from matrix i, or
// from its transpose. ldmatrix_x2 ignores the addresses of lanes 16 to 31.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  host::ldmatrix<4, false>("ldmatrix_x4()", r, row);
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  host::ldmatrix<4, true>("ldmatrix_x4_trans()", r, row);
#endif
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  host::ldmatrix<2, false>("ldmatrix_x2()", r, row);
#endif
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  host::ldmatrix<2, true>("ldmatrix_x2_trans()", r, row);
#endif
}

// d += a b over one warp, T = bfloat16_t or float16_t, float32 sums. Products are exact. The host
// sums them with d in double and rounds once; tensor cores add in an order and with a truncation
// that are not documented, so a tolerance allows one float32 rounding per term.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

#if defined(__CUDACC__)
#define MERGEME_MMA_(type)                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16_t>(float (&d)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  MERGEME_MMA_("bf16");
#else
  host::mma<bfloat16_t>("mma_m16n8k16<bfloat16_t>()", d, a, b);
#endif
}
template <>
__device__ __forceinline__ void mma_m16n8k16<float16_t>(float (&d)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  MERGEME_MMA_("f16");
#else
  host::mma<float16_t>("mma_m16n8k16<float16_t>()", d, a, b);
#endif
}

#undef MERGEME_MMA_

// Two sums rounded to T, bfloat16_t or float16_t, ties to even: as they lie side by side in memory,
// the first in the lower half. A NaN gives some NaN.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float first, float second);

template <>
__device__ __forceinline__ uint32_t round_pair<bfloat16_t>(float first, float second) {
#if defined(__CUDACC__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return host::round_pair<bfloat16_t>(first, second);
#endif
}
template <>
__device__ __forceinline__ uint32_t round_pair<float16_t>(float first, float second) {
#if defined(__CUDACC__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return host::round_pair<float16_t>(first, second);
#endif
}

// Either of such a pair.
template <typename T>
__device__ __forceinline__ float of_pair(uint32_t pair, int place) {
  return to_acc(T{static_cast<uint16_t>(pair >> 16 * place)});
}

}  // namespace mergeme::simt
