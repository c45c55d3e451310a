// Tensor cores of sm_90, which read their operands from shared memory on their own; each
// instruction wrapped once, for the device only. Torch-free.
//
// A warpgroup is four warps, the first a multiple of four, and all of it makes these calls
// together. Thread 32 w + 4 g + t of it holds of a 64 x N result D
//   d[4 j + 0], d[4 j + 1]  D[16 w + g][8 j + 2 t, +1]
//   d[4 j + 2], d[4 j + 3]  D[16 w + g + 8][8 j + 2 t, +1].
// Operands lie in shared memory in rows of 128 bytes under the 128-byte swizzle (tensor_copy.cuh),
// 8 rows, 1024 bytes, after another, and begin at a multiple of 1024:
//   kDepth   a row of shared memory holds 64 reduction steps (128 of e4m3) of one row (A) or column
//            (B);
//   kAcross  it holds one reduction step of 64 rows (A) or columns (B), and where there are more of
//            them, the next 64 lie `apart` bytes on. For 16-bit types only.
#pragma once
#include <type_traits>

#include "csrc/simt/mbarrier.cuh"

namespace mergeme::simt {

enum class Run { kDepth, kAcross };  // along which way an operand's memory runs

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Gives registers back, or waits for them: of all four warps, and a multiple of 8. The kernel needs
// launch bounds, and all its warps together never have more than it was launched with.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What the tensor cores are told of an operand: where it begins and how it goes on from there.
template <Run kRun>
__device__ __forceinline__ uint64_t operand_at(SharedAddress address, uint32_t apart = 0) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  const uint64_t across = kRun == Run::kAcross ? uint64_t{apart >> 4} << 16 : 0;
  return kSwizzle128 | kEightRows | across | address >> 4;
}

// What to add to it to move on by `bytes`.
MERGEME_HD constexpr uint64_t operand_step(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

// Before the first wgmma, and after other instructions wrote the sums.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Makes one group of the wgmmas since the last commit.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most the N most recent groups are under way. Neither sums nor operands of a group
// may be touched before.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of sums across: to stand between them and wgmma.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d += a b over 16 reduction steps, T = bfloat16_t or float16_t, 128 or 256 columns. Begins only.
// clang-format off
#define MERGEME_D8_(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                       "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MERGEME_D64_(i) MERGEME_D8_(i), MERGEME_D8_(i + 8), MERGEME_D8_(i + 16), MERGEME_D8_(i + 24), \
                        MERGEME_D8_(i + 32), MERGEME_D8_(i + 40), MERGEME_D8_(i + 48), MERGEME_D8_(i + 56)
#define MERGEME_D128_ MERGEME_D64_(0), MERGEME_D64_(64)
#define MERGEME_NAMES64_ \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MERGEME_NAMES128_ \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

#define MERGEME_WGMMA_(type, n, names, sums, p0, p1, p2, p3)                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " p0 \
               ", " p1 ", 1, 1, 1, " p2 ", " p3 ";"                                               \
               : sums                                                                             \
               : "l"(a), "l"(b), "n"(kRunA == Run::kAcross), "n"(kRunB == Run::kAcross))

template <typename T, Run kRunA, Run kRunB>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bfloat16_t>)
    MERGEME_WGMMA_("bf16", "128", MERGEME_NAMES64_, MERGEME_D64_(0), "%64", "%65", "%66", "%67");
  else
    MERGEME_WGMMA_("f16", "128", MERGEME_NAMES64_, MERGEME_D64_(0), "%64", "%65", "%66", "%67");
}
template <typename T, Run kRunA, Run kRunB>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bfloat16_t>)
    MERGEME_WGMMA_("bf16", "256", MERGEME_NAMES128_, MERGEME_D128_, "%128", "%129", "%130", "%131");
  else
    MERGEME_WGMMA_("f16", "256", MERGEME_NAMES128_, MERGEME_D128_, "%128", "%129", "%130", "%131");
}

// d = a b (kFirst) or d += a b over 32 reduction steps of e4m3, 128 columns, both kDepth. Begins
// only. The hardware aligns the products and d to the largest of them and keeps about 14 bits (as
// the DeepSeek-V3 report measured): sum few of them before adding to a float of one's own.
template <bool kFirst>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MERGEME_NAMES64_
      "}, %64, %65, p, 1, 1;}"
      : MERGEME_D64_(0)
      : "l"(a), "l"(b), "n"(!kFirst));
}

#undef MERGEME_WGMMA_
#undef MERGEME_NAMES64_
#undef MERGEME_NAMES128_
#undef MERGEME_D8_
#undef MERGEME_D64_
#undef MERGEME_D128_

// Stores 8 x 8 matrices of 16-bit elements to shared memory with all 32 lanes. Lane 8 i + j gives
// the address of row j of matrix i, 16 bytes at a multiple of 16; lane l's r[i] holds elements
// [l / 4][2 * (l % 4), +1] of matrix i.
__device__ __forceinline__ void stmatrix_x4(SharedAddress row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

#endif

}  // namespace mergeme::simt
