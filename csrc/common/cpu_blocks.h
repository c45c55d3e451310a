// Steps over a short run of elements that stays in the first cache, for the merge ops' CPU loops.
// Included by cpu_loops.cpp files only: everything is inlined, so that no instruction set's copy
// can be taken for another's. Torch-free.
#pragma once
#include <bit>

#include "csrc/common/task_vector.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MERGEME_INLINE inline __attribute__((always_inline))

namespace mergeme::blocks {

static_assert(std::endian::native == std::endian::little);

inline constexpr int kBlock = 512;  // elements a step handles at most

// The types that loops run on: float16 goes through float32 buffers, as its conversion is a call of
// its own (F16C) or many instructions.
template <typename T>
struct Loop {
  using type = T;
};
template <>
struct Loop<float16_t> {
  using type = float;
};
template <typename T>
using loop_t = typename Loop<T>::type;

// Asks for elements [begin, end) of `from`, at most a block of them, ahead of their use: with
// several models a block is too short for the processor's own read-ahead, which costs half the
// speed.
template <typename T>
MERGEME_INLINE void prefetch(const T* from, int64_t begin, int64_t end) {
  const int64_t n = end - begin < kBlock ? end - begin : kBlock;
  const char* at = reinterpret_cast<const char*>(from + begin);
  for (int64_t b = 0; b < n * int64_t(sizeof(T)); b += 64) __builtin_prefetch(at + b);
}

template <typename T>
MERGEME_INLINE void widen(const T* from, acc_t<T>* to, int n) {
  for (int j = 0; j < n; ++j) to[j] = to_acc(from[j]);
}
template <typename T>
MERGEME_INLINE void narrow(const acc_t<T>* from, T* to, int n) {
  for (int j = 0; j < n; ++j) to[j] = from_acc<T>(from[j]);
}
#if defined(__F16C__)
template <>
MERGEME_INLINE void widen<float16_t>(const float16_t* from, float* to, int n) {
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(half));
  }
  for (; j < n; ++j) to[j] = to_acc(from[j]);
}
template <>
MERGEME_INLINE void narrow<float16_t>(const float* from, float16_t* to, int n) {
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), half);
  }
  for (; j < n; ++j) to[j] = from_acc<float16_t>(from[j]);
}
#endif

// A run of `from` in loop_t<T>: itself, or widened into `buffer`.
template <typename T>
MERGEME_INLINE const loop_t<T>* loadable(const T* from, float* buffer, int n) {
  if constexpr (sizeof(T) == sizeof(loop_t<T>)) {
    return from;
  } else {
    widen(from, buffer, n);
    return buffer;
  }
}

#if defined(__AVX2__)
// A few counters at once, each word in the low half of a 64-bit lane. What is in the high halves
// does not matter before the end. Compilers find no 32 by 32 to 64 bit multiplication here: their
// code for the plain loop takes more than twice as long.
#if defined(__AVX512F__)
using Words = __m512i;
inline constexpr int kCounters = 8;
MERGEME_INLINE Words lanes_of(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
// The forms with a full mask: of the plain ones GCC 12 warns that they use an undefined value.
MERGEME_INLINE Words multiply(Words a, Words b) { return _mm512_maskz_mul_epu32(0xff, a, b); }
MERGEME_INLINE Words high_half(Words a) { return _mm512_maskz_srli_epi64(0xff, a, 32); }
MERGEME_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
MERGEME_INLINE Words pair_halves(Words low, Words high) {
  return _mm512_mask_shuffle_epi32(low, 0xaaaa, high, _MM_PERM_CCAA);
}
// to[i] = the four words of counter i, of which `first` and `second` hold two each.
MERGEME_INLINE void store_words(Words first, Words second, uint32_t* to) {
  const Words left = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const Words right = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(first, left, second));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(first, right, second));
}
MERGEME_INLINE Words count_up(uint64_t from) {
  return _mm512_add_epi64(lanes_of(from), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
#else
using Words = __m256i;
inline constexpr int kCounters = 4;
MERGEME_INLINE Words lanes_of(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
MERGEME_INLINE Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
MERGEME_INLINE Words high_half(Words a) { return _mm256_srli_epi64(a, 32); }
MERGEME_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
}
MERGEME_INLINE Words pair_halves(Words low, Words high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
}
MERGEME_INLINE void store_words(Words first, Words second, uint32_t* to) {
  const Words even = _mm256_unpacklo_epi64(first, second);  // counters 0 and 2
  const Words odd = _mm256_unpackhi_epi64(first, second);   // counters 1 and 3
  auto* at = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(at, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
MERGEME_INLINE Words count_up(uint64_t from) {
  return _mm256_add_epi64(lanes_of(from), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

// Writes the words of kCounters groups from `group` on.
MERGEME_INLINE void drop_words_of_groups(uint64_t key, uint64_t group, uint32_t model,
                                         uint32_t* to) {
  Words c0 = count_up(group), c1 = high_half(c0), c2 = lanes_of(model), c3 = lanes_of(0);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words a = multiply(c0, lanes_of(0xD2511F53u)), b = multiply(c2, lanes_of(0xCD9E8D57u));
    c0 = xor3(high_half(b), c1, lanes_of(k0));
    c2 = xor3(high_half(a), c3, lanes_of(k1));
    c1 = b;
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  store_words(pair_halves(c0, c1), pair_halves(c2, c3), to);
}
#else
inline constexpr int kCounters = 1;
MERGEME_INLINE void drop_words_of_groups(uint64_t key, uint64_t group, uint32_t model,
                                         uint32_t* to) {
  const PhiloxWords out = drop_words(key, group, model);
  for (int w = 0; w < 4; ++w) to[w] = out.w[w];
}
#endif

// The 16 random bits of each of n <= kBlock elements from flat index `first` on, as written by
// drop_words. The result points into `words`.
using Random16 = uint16_t __attribute__((may_alias));  // halves of the generator's words
inline constexpr int kWordsOfBlock = kBlock / 2 + 4 * (kCounters + 1);
MERGEME_INLINE const Random16* random_bits(uint64_t key, uint32_t model, int64_t first, int n,
                                           uint32_t* words) {
  const uint64_t group = uint64_t(first) / kDecisionsPerGroup;
  const int skip = int(uint64_t(first) % kDecisionsPerGroup);
  const int groups = (skip + n + kDecisionsPerGroup - 1) / kDecisionsPerGroup;
  for (int g = 0; g < groups; g += kCounters)
    drop_words_of_groups(key, group + uint64_t(g), model, words + 4 * g);
  return reinterpret_cast<const Random16*>(words) + skip;
}

}  // namespace mergeme::blocks
