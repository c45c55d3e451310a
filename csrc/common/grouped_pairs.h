// Operands of a grouped product in bfloat16, repacked into words of two k of one row or column, the
// even one below: what VDPBF16PS and TDPBF16PS multiply. Torch-free; AVX-512 only.
//
// Included only by files that are compiled once per instruction set: all of it is internal.
#pragma once
#include <immintrin.h>

#include "csrc/common/cpu_vector.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme {
namespace {

constexpr int64_t kWordLanes = 16;  // words in a vector

// The first `count` (up to 32) elements from `from` on, zeros after them; null gives zeros.
MERGEME_INLINE __m512i load_halves(const bfloat16_t* from, int64_t count) {
  if (from == nullptr || count <= 0) return _mm512_setzero_si512();
  const auto mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, from);
}

// 16 words of `count` elements each of two steps k, for 16 rows or columns that lie side by side.
MERGEME_INLINE __m512i pair_up(const bfloat16_t* even, const bfloat16_t* odd, int64_t count) {
  const auto widen = [count](const bfloat16_t* from) __attribute__((always_inline)) {
    if (from == nullptr || count <= 0) return _mm512_setzero_si512();
    const auto mask = __mmask16(count >= 16 ? 0xffff : (1 << count) - 1);
    return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, from));
  };
  return widen(even) | _mm512_maskz_slli_epi32(0xffff, widen(odd), 16);
}

// Words of the 32 steps from k on, for `count` (up to 16) rows or columns from `first` on of an
// operand whose rows hold one step each: to[i] is the word of steps k + 2i and k + 2i + 1.
MERGEME_INLINE void pair_steps(const Operand& from, int64_t first, int64_t count, int64_t k,
                               int64_t depth, __m512i (&to)[kWordLanes]) {
  const auto step = [&](int64_t i) __attribute__((always_inline)) {
    return i < depth && count > 0 ? from.template row<bfloat16_t>(i) + first : nullptr;
  };
#pragma GCC unroll 1
  for (int64_t i = 0; i < kWordLanes; ++i)
    to[i] = pair_up(step(k + 2 * i), step(k + 2 * i + 1), count);
}

// Exchanges words and vectors: to[i][j] = from[j][i].
MERGEME_INLINE void transpose_words(__m512i (&words)[kWordLanes]) {
  FloatVector square[kWordLanes];  // of whatever bits: they are only moved
#pragma GCC unroll 16
  for (int i = 0; i < kWordLanes; ++i) square[i] = reinterpret_cast<FloatVector>(words[i]);
  transpose<float>(square);
#pragma GCC unroll 16
  for (int i = 0; i < kWordLanes; ++i) words[i] = reinterpret_cast<__m512i>(square[i]);
}

// Steps [k, k + depth) of 16 lanes become out[i * stride + lane], a word for each two steps, up to
// a multiple of kPackedDepth steps, beyond which and in lanes without a row there are zeros. The
// operand's rows are the lanes, lane j's being row(j), or null; or, if they run across, they hold
// one step each and `count` lanes from `first` on.
template <typename Row>
MERGEME_INLINE void pack_words(const Operand& from, int64_t first, int64_t count, Row row,
                               int64_t k, int64_t depth, uint32_t* out, int64_t stride) {
  __m512i words[kWordLanes];
  for (int64_t i = 0; i < depth; i += kPackedDepth, out += kWordLanes * stride) {
    if (from.across) {
      pair_steps(from, first, count, k + i, k + depth, words);
    } else {
#pragma GCC unroll 1
      for (int64_t j = 0; j < kWordLanes; ++j) {
        const bfloat16_t* at = row(j);
        words[j] = load_halves(at ? at + k + i : nullptr, depth - i);
      }
      transpose_words(words);
    }
    for (int64_t j = 0; j < kWordLanes; ++j) _mm512_storeu_si512(out + j * stride, words[j]);
  }
}

// Steps [k, k + depth) of a panel of B: words [depth / 2][32 columns].
MERGEME_INLINE void pack_right_words(const Operand& b, int64_t panel, int64_t columns, int64_t k,
                                     int64_t depth, uint32_t* out) {
  for (int64_t half = 0; half < kPanelColumns; half += kWordLanes) {
    const int64_t first = panel * kPanelColumns + half;
    const auto row = [&](int64_t j) __attribute__((always_inline)) -> const bfloat16_t* {
      const int64_t i = b.columns.row_of(panel, half + j, columns);
      return i >= 0 ? b.template row<bfloat16_t>(i) : nullptr;
    };
    pack_words(b, first, columns - first, row, k, depth, out + half, kPanelColumns);
  }
}

}  // namespace
}  // namespace mergeme
