// Vectors as wide as the instruction set being compiled for, for the CPU loops. Torch-free.
//
// Included by files that are compiled once per instruction set, so everything sits in an unnamed
// namespace and is always inlined: no copy made for one set can be linked into another.
#pragma once
#include <cmath>
#include <utility>

#include "csrc/common/numeric.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MERGEME_INLINE inline __attribute__((always_inline))

namespace mergeme {
namespace {

MERGEME_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MERGEME_INLINE int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
MERGEME_INLINE int64_t round_up(int64_t total, int64_t size) { return parts(total, size) * size; }

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t BitsVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t ByteVector __attribute__((vector_size(kVectorBytes / 4)));

template <typename Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <typename Acc>
using vector_t = typename VectorOf<Acc>::type;

// Elements in one vector of accumulators.
template <typename Acc>
constexpr int kLanes = kVectorBytes / int(sizeof(Acc));

// a * b + c; fused where the instruction set has it, else two roundings.
MERGEME_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
MERGEME_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// One vector of accumulators from kLanes elements at any address.
MERGEME_INLINE FloatVector load(const float* p) {
  FloatVector v;
  memcpy(&v, p, sizeof v);
  return v;
}
MERGEME_INLINE DoubleVector load(const double* p) {
  DoubleVector v;
  memcpy(&v, p, sizeof v);
  return v;
}
MERGEME_INLINE FloatVector load(const bfloat16_t* p) {
#if defined(__AVX512F__)  // gcc 12 makes two halves and a join of the plain conversion
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const BitsVector bits = reinterpret_cast<BitsVector>(_mm512_maskz_cvtepu16_epi32(0xffff, h))
                          << 16;
#else
  HalfBitsVector h;
  memcpy(&h, p, sizeof h);
  const BitsVector bits = __builtin_convertvector(h, BitsVector) << 16;
#endif
  return reinterpret_cast<FloatVector>(bits);
}
MERGEME_INLINE FloatVector load(const float16_t* p) {
#if defined(__AVX512F__)
  // The masked form, all lanes on: gcc 12 warns about its own header in the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  FloatVector v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

// Rounds each lane once and writes kLanes elements to any address.
MERGEME_INLINE void store(float* p, FloatVector v) { memcpy(p, &v, sizeof v); }
MERGEME_INLINE void store(double* p, DoubleVector v) { memcpy(p, &v, sizeof v); }
MERGEME_INLINE void store(bfloat16_t* p, FloatVector v) {
  const BitsVector u = reinterpret_cast<BitsVector>(v);
  const BitsVector rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // ties to even
  const BitsVector quiet = (u >> 16) | 0x40u;
  const HalfBitsVector h =
      __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, HalfBitsVector);
  memcpy(p, &h, sizeof h);
}
MERGEME_INLINE void store(float16_t* p, FloatVector v) {
#if defined(__AVX512F__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, kNearest));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_acc<float16_t>(v[i]);
#endif
}

// ---- e4m3

// The number in the highest byte of each lane; bits below it must be zero.
MERGEME_INLINE FloatVector decode_e4m3(BitsVector top) {
  const IntVector rest = reinterpret_cast<IntVector>((top & 0x7f000000u) >> 4);
  const IntVector subnormal = rest < 0x800000;  // all ones where it is one
  // A subnormal is taken as if it had the smallest exponent, less what that adds, 2^-6.
  const IntVector biased = rest + (120 << 23) + (subnormal & (1 << 23));
  const FloatVector extra = reinterpret_cast<FloatVector>(subnormal & 0x3c800000);
  const FloatVector size = reinterpret_cast<FloatVector>(biased) - extra;
  const IntVector bits = reinterpret_cast<IntVector>(size);
  const IntVector known = rest == 0x7f00000 ? IntVector{} + 0x7fc00000 : bits;
  return reinterpret_cast<FloatVector>(reinterpret_cast<BitsVector>(known) | (top & 0x80000000u));
}

// from_acc<float8_e4m3_t> of each lane, in its lowest byte.
MERGEME_INLINE BitsVector encode_e4m3(FloatVector x) {
  constexpr int32_t kMax = 0x43e00000, kInfinite = 0x7f800000;  // 448
  const BitsVector bits = reinterpret_cast<BitsVector>(x), sign = (bits >> 24) & 0x80u;
  const IntVector all = reinterpret_cast<IntVector>(bits & 0x7fffffffu);
  const IntVector a = all > kMax ? IntVector{} + kMax : all;
  const IntVector normal = (a + 0x7ffff + ((a >> 20) & 1) - (120 << 23)) >> 20;
  const FloatVector shifted = reinterpret_cast<FloatVector>(a) + 16384.f;  // rounds at 2^-9
  const IntVector subnormal = reinterpret_cast<IntVector>(shifted) - 0x46800000;
  const IntVector number = a < 0x3c800000 ? subnormal : normal;
  const IntVector known = all >= kInfinite ? IntVector{} + 0x7f : number;
  return reinterpret_cast<BitsVector>(known) | sign;
}

MERGEME_INLINE FloatVector load(const float8_e4m3_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const BitsVector lanes = reinterpret_cast<BitsVector>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#else
  ByteVector bytes;
  memcpy(&bytes, p, sizeof bytes);
  const BitsVector lanes = __builtin_convertvector(bytes, BitsVector);
#endif
  return decode_e4m3(lanes << 24);
}

MERGEME_INLINE void store(float8_e4m3_t* p, FloatVector v) {
  const ByteVector bytes = __builtin_convertvector(encode_e4m3(v), ByteVector);
  memcpy(p, &bytes, sizeof bytes);
}

// ---- parts of vectors

// The same for the first `count` elements only; lanes beyond them load as zero.
template <typename T>
MERGEME_INLINE auto load_some(const T* p, int64_t count) {
  T padded[kLanes<acc_t<T>>] = {};
  memcpy(padded, p, size_t(count) * sizeof(T));
  return load(padded);
}
template <typename T>
MERGEME_INLINE void store_some(T* p, vector_t<acc_t<T>> v, int64_t count) {
  T padded[kLanes<acc_t<T>>];
  store(padded, v);
  memcpy(p, padded, size_t(count) * sizeof(T));
}

// Calls fn(j, some) for the elements of a row, a vector or less at a time; and what reads and
// writes such a part.
template <typename Acc, typename F>
MERGEME_INLINE void for_vectors(int64_t count, F fn) {
  for (int64_t j = 0; j < count; j += kLanes<Acc>)
    fn(j, count - j < kLanes<Acc> ? count - j : int64_t{kLanes<Acc>});
}
template <typename T>
MERGEME_INLINE auto load_first(const T* from, int64_t some) {
  return some == kLanes<acc_t<T>> ? load(from) : load_some(from, some);
}
template <typename T>
MERGEME_INLINE void store_first(T* to, vector_t<acc_t<T>> value, int64_t some) {
  if (some == kLanes<acc_t<T>>)
    store(to, value);
  else
    store_some(to, value, some);
}

template <typename Acc>
MERGEME_INLINE vector_t<Acc> broadcast(Acc x) {
  return x - vector_t<Acc>{};  // minus zero costs nothing: plus zero would change -0
}

// Sum of the lanes, halving each time: a fixed order.
template <typename Acc>
MERGEME_INLINE Acc sum_lanes(vector_t<Acc> v) {
  Acc lanes[kLanes<Acc>];
  memcpy(lanes, &v, sizeof v);
  for (int half = kLanes<Acc> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Exchanges bit kBit of the row number with that of the lane number, for the rows a and b that
// differ in it.
template <int kBit, typename V, size_t... kLane>
MERGEME_INLINE void exchange_bit(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr int n = sizeof...(kLane);
  const V first =
      __builtin_shufflevector(a, b, (int(kLane) & kBit ? n + (int(kLane) ^ kBit) : int(kLane))...);
  const V second =
      __builtin_shufflevector(a, b, (int(kLane) & kBit ? n + int(kLane) : int(kLane) | kBit)...);
  a = first;
  b = second;
}
// Transposes a square of kLanes vectors in registers.
template <typename Acc, int kBit = 1>
MERGEME_INLINE void transpose(vector_t<Acc> (&rows)[kLanes<Acc>]) {
  if constexpr (kBit < kLanes<Acc>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Acc>; ++i)
      if (!(i & kBit))
        exchange_bit<kBit>(rows[i], rows[i | kBit], std::make_index_sequence<kLanes<Acc>>{});
    transpose<Acc, 2 * kBit>(rows);
  }
}

// e^x to about one unit in the last place: x = n ln 2 + r, Taylor's polynomial of degree 7 in r
// (remainder below 6e-9 for |r| <= ln 2 / 2), and 2^n in two factors so that neither overflows.
MERGEME_INLINE FloatVector exp(FloatVector x) {
  x = x > 89.f ? broadcast(89.f) : x;  // e^89 is infinite, e^-104 is zero; NaN passes
  x = x < -104.f ? broadcast(-104.f) : x;
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVector shifted = x * 1.44269504f + kShift;
  const FloatVector n = shifted - kShift;
  const FloatVector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  FloatVector p = broadcast(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = fma(p, r, broadcast(c));
  const IntVector whole =
      reinterpret_cast<IntVector>(shifted) - reinterpret_cast<IntVector>(broadcast(kShift));
  const IntVector half = whole >> 1;
  return p * reinterpret_cast<FloatVector>((half + 127) << 23) *
         reinterpret_cast<FloatVector>((whole - half + 127) << 23);
}
MERGEME_INLINE DoubleVector exp(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace mergeme
