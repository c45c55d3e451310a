// Grouped products in bfloat16 by VDPBF16PS. Torch-free.
//
// Included by grouped_panels.h alone, for the sets that have the instruction; what it says of
// panels, blocks and sums that no cut changes holds here. A c is one chain over ascending pairs of
// k; in a pair the odd k is added first, each product rounded once, and denormals count as zero.
#pragma once
#include "csrc/common/grouped_pairs.h"

namespace mergeme {
namespace {

constexpr int kDotRows = 14;  // with two vectors of B: 28 sums, and registers to spare
constexpr int64_t kDotStride = 16;

// c[r, :] (+)= a b for kRows rows and kPanels panels, `panel_words` apart in b, from words of A,
// [words][kDotStride], and of B; c's panels are side by side.
template <int kRows, int kPanels>
void multiply_dots(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t words,
                   float* c, int64_t ldc, bool first) {
  __m512 sum[kPanels][kRows][2];
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        sum[p][r][i] = first ? _mm512_setzero_ps()
                             : _mm512_loadu_ps(c + r * ldc + p * kPanelColumns + i * kWordLanes);
  for (int64_t w = 0; w < words; ++w, a += kDotStride, b += kPanelColumns) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const uint32_t* at = b + p * panel_words;
      const __m512i low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + kWordLanes);
      __builtin_prefetch(at + kPrefetchWords);
      __builtin_prefetch(at + kPrefetchWords + kWordLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(a[r])));
        sum[p][r][0] = _mm512_dpbf16_ps(sum[p][r][0], x, reinterpret_cast<__m512bh>(low));
        sum[p][r][1] = _mm512_dpbf16_ps(sum[p][r][1], x, reinterpret_cast<__m512bh>(high));
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        _mm512_storeu_ps(c + r * ldc + p * kPanelColumns + i * kWordLanes, sum[p][r][i]);
}

template <int kRows = kDotRows>
MERGEME_INLINE void multiply_dot_block(int64_t rows, const uint32_t* a, const uint32_t* b,
                                       int64_t panel_words, int64_t words, int64_t panels, float* c,
                                       int64_t ldc, bool first) {
  if constexpr (kRows > 0) {
    if (rows != kRows)
      return multiply_dot_block<kRows - 1>(rows, a, b, panel_words, words, panels, c, ldc, first);
    constexpr int kAtOnce = kRows <= kDotRows / 2 ? 2 : 1;  // few rows: twice the chains
    int64_t p = 0;
    for (; p + kAtOnce <= panels; p += kAtOnce)
      multiply_dots<kRows, kAtOnce>(a, b + p * panel_words, panel_words, words,
                                    c + p * kPanelColumns, ldc, first);
    for (; p < panels; ++p)
      multiply_dots<kRows, 1>(a, b + p * panel_words, panel_words, words, c + p * kPanelColumns,
                              ldc, first);
  }
}

// multiply_panels for bfloat16.
template <typename Epilogue>
MERGEME_INLINE void multiply_panels_by_dots(const PanelTask& task, void* scratch,
                                            Epilogue epilogue) {
  const int64_t blocks = parts(task.rows, kDotRows);
  const int64_t words = parts(task.depth, kPackedDepth) * kPackedDepth / 2;  // of a row
  constexpr int64_t ldc = kPanelGroup * kPanelColumns;
  const auto first_row = [&](int64_t block) { return task.rows * block / blocks; };
  const auto rows_of = [&](int64_t block) { return first_row(block + 1) - first_row(block); };
  uint32_t* left = static_cast<uint32_t*>(scratch);
  float* c = reinterpret_cast<float*>(left + blocks * words * kDotStride);
  uint32_t* right = reinterpret_cast<uint32_t*>(c + task.rows * ldc);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t m = task.first_row + first_row(i);
    const auto row = [&](int64_t j) __attribute__((always_inline)) {
      return j < rows_of(i) ? task.a.template row<bfloat16_t>(m + j) : nullptr;
    };
    pack_words(task.a, m, rows_of(i), row, 0, task.depth, left + i * words * kDotStride,
               kDotStride);
  }
  constexpr int64_t kStep = kPanelDepth / 2;  // words of the depth that caches hold for a group
  const uint32_t* packed = static_cast<const uint32_t*>(task.packed);
  for (int64_t p = task.first_panel; p < task.end_panel; p += kPanelGroup) {
    const int64_t count = smaller(kPanelGroup, task.end_panel - p);
    const int64_t step = packed && blocks == 1 && words > 0 ? words : kStep;
    for (int64_t w = 0; w < words || w == 0; w += step) {
      const int64_t some = smaller(step, words - w);
      for (int64_t j = 0; j < count && !packed; ++j)
        pack_right_words(task.b, p + j, task.columns, 2 * w, smaller(2 * some, task.depth - 2 * w),
                         right + j * kStep * kPanelColumns);
      const uint32_t* from = packed ? packed + (p * words + w) * kPanelColumns : right;
      const int64_t panel_words = (packed ? words : kStep) * kPanelColumns;
      for (int64_t i = 0; i < blocks; ++i)
        multiply_dot_block(rows_of(i), left + (i * words + w) * kDotStride, from, panel_words, some,
                           count, c + first_row(i) * ldc, ldc, w == 0);
    }
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t j = 0; j < count; ++j)
        epilogue(first_row(i), rows_of(i), p + j, c + first_row(i) * ldc + j * kPanelColumns, ldc);
  }
}

}  // namespace
}  // namespace mergeme
