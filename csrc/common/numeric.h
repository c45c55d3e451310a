// Element types and scalar helpers shared by CPU, CUDA and host-SIMT code. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define MERGEME_HD __host__ __device__ __forceinline__
#else
// Always inlined: a loop file compiled for AVX-512 must not leave a shared copy of a helper that
// the linker could pick for the portable code.
#define MERGEME_HD inline __attribute__((always_inline))
#endif

namespace mergeme {

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

struct float16_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};
// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, NaN where all seven are set. An
// operand with scales beside it, never an element type on its own: DType does not name it.
struct float8_e4m3_t {
  uint8_t bits;
};
inline constexpr float kMaxFloat8 = 448;

MERGEME_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
MERGEME_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

MERGEME_HD uint64_t bits_of(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}
MERGEME_HD double double_of(uint64_t u) {
  double x;
  memcpy(&x, &u, 8);
  return x;
}

// Accumulator of T: float for everything up to float32, double for float64.
template <typename T>
struct acc {
  using type = float;
};
template <>
struct acc<double> {
  using type = double;
};
template <typename T>
using acc_t = typename acc<T>::type;

MERGEME_HD float to_acc(float x) { return x; }
MERGEME_HD double to_acc(double x) { return x; }
MERGEME_HD float to_acc(bfloat16_t x) { return float_of(uint32_t{x.bits} << 16); }
MERGEME_HD float to_acc(float16_t x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exp = (x.bits >> 10) & 0x1f,
                 man = x.bits & 0x3ffu;
  if (exp == 0x1f) return float_of(sign | 0x7f800000u | (man << 13));
  if (exp == 0) return (sign ? -1.f : 1.f) * float(man) * 5.9604644775390625e-8f;  // 2^-24
  return float_of(sign | ((exp + 112) << 23) | (man << 13));
#endif
}

MERGEME_HD float to_acc(float8_e4m3_t x) {
  const uint32_t sign = uint32_t(x.bits & 0x80u) << 24, rest = uint32_t(x.bits & 0x7fu) << 20;
  if (rest == 0x7f00000u) return float_of(sign | 0x7fc00000u);
  if (rest < 0x800000u)  // subnormal: as if it had the smallest exponent, less what that adds
    return float_of(sign | bits_of(float_of(rest + (121u << 23)) - 0.015625f));  // 2^-6
  return float_of(sign | (rest + (120u << 23)));
}

template <typename T>
MERGEME_HD T from_acc(acc_t<T> x);
template <>
MERGEME_HD float from_acc<float>(float x) {
  return x;
}
template <>
MERGEME_HD double from_acc<double>(double x) {
  return x;
}
template <>
MERGEME_HD bfloat16_t from_acc<bfloat16_t>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};  // quiet NaN
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};                  // ties to even
}
template <>
MERGEME_HD float16_t from_acc<float16_t>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (a < 0x38800000u) {  // subnormal: add 0.5 so the FPU rounds at 2^-24
    const uint32_t r = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
    return {uint16_t(sign | r)};
  }
  return {uint16_t(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13))};
#endif
}

// Ties to even; beyond 448, the largest, it is 448; infinities, which e4m3 lacks, become NaN too.
template <>
MERGEME_HD float8_e4m3_t from_acc<float8_e4m3_t>(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 24) & 0x80u;
  uint32_t a = u & 0x7fffffffu;
  if (a >= 0x7f800000u) return {uint8_t(sign | 0x7fu)};
  if (a > 0x43e00000u) a = 0x43e00000u;  // 448
  if (a < 0x3c800000u)                   // subnormal: add 2^14 so the FPU rounds at 2^-9
    return {uint8_t(sign | (bits_of(float_of(a) + 16384.f) - 0x46800000u))};
  return {uint8_t(sign | ((a + 0x7ffffu + ((a >> 20) & 1u) - (120u << 23)) >> 20))};
}

// Calls fn.template operator()<T>() for the element type named by `dtype`.
template <typename F>
void dispatch_floating(DType dtype, F&& fn) {
  switch (dtype) {
    case DType::kFloat16:
      return fn.template operator()<float16_t>();
    case DType::kBFloat16:
      return fn.template operator()<bfloat16_t>();
    case DType::kFloat32:
      return fn.template operator()<float>();
    case DType::kFloat64:
      return fn.template operator()<double>();
  }
}

MERGEME_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether 16-byte vector accesses may start at `p`. For host code.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace mergeme
