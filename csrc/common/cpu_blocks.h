// Steps over a short run of elements that stays in the first cache, for the merge ops' CPU loops.
// Included by cpu_loops.cpp files only: everything is inlined, so that no instruction set's copy
// can be taken for another's. Torch-free.
#pragma once
#include <bit>

#include "csrc/common/task_vector.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define MERGEME_INLINE inline __attribute__((always_inline))

namespace mergeme::blocks {

static_assert(std::endian::native == std::endian::little);

inline constexpr int kBlock = 1024;  // elements a step handles at most

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

// The 16 random bits of each of n <= kBlock elements from flat index `first` on, as written by
// drop_words. The result points into `words`.
using Random16 = uint16_t __attribute__((may_alias));  // halves of the generator's words
inline constexpr int kWordsOfBlock = kBlock / 2 + 8;
MERGEME_INLINE const Random16* random_bits(uint64_t key, uint32_t model, int64_t first, int n,
                                           uint32_t* words) {
  const uint64_t group = uint64_t(first) / kDecisionsPerGroup;
  const int skip = int(uint64_t(first) % kDecisionsPerGroup);
  const int groups = (skip + n + kDecisionsPerGroup - 1) / kDecisionsPerGroup;
  const uint32_t low = uint32_t(group), high = uint32_t(group >> 32);
  for (int g = 0; g < groups; ++g) {
    const uint32_t c0 = low + uint32_t(g);
    const PhiloxWords out = philox(key, c0, high + (c0 < low), model, 0);
    words[4 * g] = out.w[0];
    words[4 * g + 1] = out.w[1];
    words[4 * g + 2] = out.w[2];
    words[4 * g + 3] = out.w[3];
  }
  return reinterpret_cast<const Random16*>(words) + skip;
}

}  // namespace mergeme::blocks
