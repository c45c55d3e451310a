// Grouped matrix products on one CPU thread, by panels. Torch-free.
//
// Included only by files that are compiled once per instruction set (see cpu_vector.h for why all
// of it is internal). A product C[m, n] = sum over k of A(m, k) B(k, n) of one group is cut into
// panels of 32 columns of B and blocks of at most kMaxRows rows of A:
//
//   A is repacked to [depth, kRowStride] per block, widened, so that the rows of one k lie side by
//     side and each is broadcast from memory;
//   B is repacked to [depth, 32] per panel, widened, for as much of the depth as caches hold;
//     weights packed before (ops/packed_experts) are read as they are where there are only a few
//     blocks of rows, and widened once for all blocks otherwise.
//
// Every c is one chain of multiply-adds over ascending k, whatever the packing, the cut into blocks
// and panels, the number of rows or of threads: none of them changes a bit. In bfloat16 the sets
// with instructions of their own for it sum in another order, which they too keep whatever the cut.
#pragma once
#include <type_traits>

#include "csrc/common/cpu_vector.h"
#include "csrc/common/grouped_blocks.h"
#if defined(__AMX_BF16__)
#include "csrc/common/grouped_tiles.h"
#elif defined(__AVX512BF16__)
#include "csrc/common/grouped_dots.h"
#endif

namespace mergeme {
namespace {

// Rows of A per step: with two vectors of B as many sums as registers allow.
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
constexpr int kRowStride = 16;
#else
constexpr int kMaxRows = 6;
constexpr int kRowStride = 8;
#endif
static_assert(kVectorBytes <= kMaxVectorBytes && kMaxRows <= kRowStride);

// ---- packed words: two k of one column in 32 bits, the even one below ------------------------

template <typename T>
constexpr bool kPaired = sizeof(T) == 2;

// The even and the odd k of a vector of words.
template <typename T>
MERGEME_INLINE void split_pair(BitsVector words, FloatVector& even, FloatVector& odd);
template <>
MERGEME_INLINE void split_pair<bfloat16_t>(BitsVector words, FloatVector& even, FloatVector& odd) {
  even = reinterpret_cast<FloatVector>(words << 16);
  odd = reinterpret_cast<FloatVector>(words & 0xffff0000u);
}
template <>
MERGEME_INLINE void split_pair<float16_t>(BitsVector words, FloatVector& even, FloatVector& odd) {
  const HalfBitsVector low = __builtin_convertvector(words & 0xffffu, HalfBitsVector);
  const HalfBitsVector high = __builtin_convertvector(words >> 16, HalfBitsVector);
  float16_t halves[kLanes<float>];
  memcpy(halves, &low, sizeof low);
  even = load(halves);
  memcpy(halves, &high, sizeof high);
  odd = load(halves);
}

// ---- micro-kernels ---------------------------------------------------------------------------

// c[r, :] (+)= sum over k of a[k, r] * b[k, :] for kRows rows and two vectors of columns. Meanwhile
// every step asks for the next `ahead_step` bytes at `ahead`, which are wanted later.
template <int kRows, typename Acc>
void multiply_block(const Acc* a, const Acc* b, int64_t depth, Acc* c, int64_t ldc, bool first,
                    const char* ahead, int64_t ahead_step) {
  constexpr int kWidth = kLanes<Acc>;
  vector_t<Acc> sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sum[r][i] = first ? vector_t<Acc>{} : load(c + r * ldc + i * kWidth);
  for (int64_t k = 0; k < depth; ++k) {
    const auto b0 = load(b + k * kPanelColumns), b1 = load(b + k * kPanelColumns + kWidth);
    __builtin_prefetch(ahead + k * ahead_step, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto x = broadcast(a[k * kRowStride + r]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) store(c + r * ldc + i * kWidth, sum[r][i]);
}

// The same from packed words of kPanels panels, `stride` words apart; c's panels are side by side.
template <int kRows, int kPanels, typename T>
void multiply_words(const float* a, const uint32_t* b, int64_t stride, int64_t depth, float* c,
                    int64_t ldc) {
  constexpr int kWidth = kLanes<float>;
  FloatVector sum[kPanels][kRows][2] = {};
  for (int64_t k = 0; k < depth; k += 2) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const uint32_t* at = b + p * stride + k / 2 * kPanelColumns;
      FloatVector even[2], odd[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        BitsVector words;
        memcpy(&words, at + i * kWidth, sizeof words);
        split_pair<T>(words, even[i], odd[i]);
      }
      __builtin_prefetch(at + kPrefetchWords);
      if constexpr (kWidth == 16) __builtin_prefetch(at + kPrefetchWords + kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto x = broadcast(a[k * kRowStride + r]);
        sum[p][r][0] = fma(x, even[0], sum[p][r][0]);
        sum[p][r][1] = fma(x, even[1], sum[p][r][1]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto x = broadcast(a[(k + 1) * kRowStride + r]);
        sum[p][r][0] = fma(x, odd[0], sum[p][r][0]);
        sum[p][r][1] = fma(x, odd[1], sum[p][r][1]);
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) store(c + r * ldc + p * kPanelColumns + i * kWidth, sum[p][r][i]);
}

// Calls fn.template operator()<kRows>() with the number of rows as a constant.
template <int kRows = kMaxRows, typename F>
MERGEME_INLINE void with_rows(int64_t rows, F fn) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return fn.template operator()<kRows>();
    with_rows<kRows - 1>(rows, fn);
  }
}

// c[:, 32 columns] (+)= a [depth, kRowStride] times one widened panel.
template <typename Acc>
MERGEME_INLINE void multiply_panel(int64_t rows, const Acc* a, const Acc* b, int64_t depth, Acc* c,
                                   int64_t ldc, bool first, const char* ahead, int64_t ahead_step) {
  with_rows(rows, [&]<int kRows>() {
    for (int64_t column = 0; column < kPanelColumns; column += 2 * kLanes<Acc>)
      multiply_block<kRows>(a, b + column, depth, c + column, ldc, first, ahead, ahead_step);
  });
}

// Panels whose chains keep the multipliers busy with this many rows.
MERGEME_INLINE constexpr int panels_at_once(int rows) { return 2 * rows <= kMaxRows - 2 ? 2 : 1; }

template <typename T>
MERGEME_INLINE void multiply_packed(int64_t rows, const float* a, const uint32_t* b, int64_t stride,
                                    int64_t depth, int64_t panels, float* c, int64_t ldc) {
  with_rows(rows, [&]<int kRows>() {
    constexpr int kAtOnce = panels_at_once(kRows);
    int64_t p = 0;
    for (; p + kAtOnce <= panels; p += kAtOnce)
      for (int64_t column = 0; column < kPanelColumns; column += 2 * kLanes<float>)
        multiply_words<kRows, kAtOnce, T>(a, b + p * stride + column, stride, depth,
                                          c + p * kPanelColumns + column, ldc);
    for (; p < panels; ++p)
      for (int64_t column = 0; column < kPanelColumns; column += 2 * kLanes<float>)
        multiply_words<kRows, 1, T>(a, b + p * stride + column, stride, depth,
                                    c + p * kPanelColumns + column, ldc);
  });
}

// ---- repacking -------------------------------------------------------------------------------

// out[k * stride + j] = row(j)[k], widened, for j < kLanes and k < depth; a null row gives zeros.
template <typename T, typename Row>
MERGEME_INLINE void transpose_rows(Row row, int64_t depth, acc_t<T>* out, int64_t stride) {
  using Acc = acc_t<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  const T* from[kWidth];
#pragma GCC unroll 16
  for (int64_t j = 0; j < kWidth; ++j) from[j] = row(j);
  for (int64_t k = 0; k < depth; k += kWidth) {
    const int64_t some = smaller(kWidth, depth - k);
    vector_t<Acc> square[kWidth];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kWidth; ++j)
      square[j] = !from[j]         ? vector_t<Acc>{}
                  : some == kWidth ? load(from[j] + k)
                                   : load_some(from[j] + k, some);
    transpose<Acc>(square);
    if (some == kWidth) {
#pragma GCC unroll 16
      for (int64_t j = 0; j < kWidth; ++j) store(out + (k + j) * stride, square[j]);
    } else {
      for (int64_t j = 0; j < some; ++j) store(out + (k + j) * stride, square[j]);
    }
  }
}

// A block of A: `rows` rows from row m on become [depth, kRowStride]; lanes past them are zero.
template <typename T>
void pack_left(const Operand& a, int64_t m, int64_t rows, int64_t depth, acc_t<T>* out) {
  using Acc = acc_t<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  if (!a.across) {
    for (int64_t j = 0; j < kRowStride; j += kWidth)
      transpose_rows<T>(
          [&](int64_t i) { return j + i < rows ? a.template row<T>(m + j + i) : nullptr; }, depth,
          out + j, kRowStride);
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = a.template row<T>(k) + m;
    for (int64_t j = 0; j < kRowStride; j += kWidth) {
      const int64_t some = smaller(kWidth, rows - j);
      store(out + k * kRowStride + j, some == kWidth ? load(from + j)
                                      : some > 0     ? load_some(from + j, some)
                                                     : vector_t<Acc>{});
    }
  }
}

// A panel of B, steps [k, k + depth) of it, from the weights' or tokens' own layout.
template <typename T>
void pack_right(const Operand& b, int64_t panel, int64_t columns, int64_t k, int64_t depth,
                acc_t<T>* out) {
  using Acc = acc_t<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  const int64_t first = panel * kPanelColumns;
  if (!b.across) {
    for (int64_t j = 0; j < kPanelColumns; j += kWidth)
      transpose_rows<T>(
          [&](int64_t i) -> const T* {
            const int64_t row = b.columns.row_of(panel, j + i, columns);
            return row >= 0 ? b.template row<T>(row) + k : nullptr;
          },
          depth, out + j, kPanelColumns);
    return;
  }
  const int64_t count = smaller(kPanelColumns, columns - first);
  for (int64_t i = 0; i < depth; ++i) {
    const T* from = b.template row<T>(k + i) + first;
    for (int64_t j = 0; j < kPanelColumns; j += kWidth) {
      const int64_t some = smaller(kWidth, count - j);
      store(out + i * kPanelColumns + j, some == kWidth ? load(from + j)
                                         : some > 0     ? load_some(from + j, some)
                                                        : vector_t<Acc>{});
    }
  }
}

// Steps [k, k + depth) of a packed panel (all its columns), widened; k is even.
template <typename T>
void widen_panel(const T* panel, int64_t k, int64_t depth, float* out) {
  constexpr int64_t kWidth = kLanes<float>;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(panel) + k / 2 * kPanelColumns;
  for (int64_t i = 0; i < depth; i += 2, words += kPanelColumns) {
    for (int64_t j = 0; j < kPanelColumns; j += kWidth) {
      BitsVector pair;
      memcpy(&pair, words + j, sizeof pair);
      FloatVector even, odd;
      split_pair<T>(pair, even, odd);
      store(out + i * kPanelColumns + j, even);
      if (i + 1 < depth) store(out + (i + 1) * kPanelColumns + j, odd);
    }
  }
}

// ---- one group's share -----------------------------------------------------------------------

// Computes `task` and calls epilogue(row, rows, panel, c, ldc) once for every block of rows and
// panel: c holds the sums of rows [row, row + rows) (counted from the task's first) and the panel's
// 32 columns.
template <typename T, typename Epilogue>
MERGEME_INLINE void multiply_panels_by_vectors(const PanelTask& task, void* scratch,
                                               Epilogue epilogue) {
  using Acc = acc_t<T>;
  const int64_t depth = task.depth, blocks = (task.rows + kMaxRows - 1) / kMaxRows;
  const int64_t even_depth = round_up(depth, 2), left_size = even_depth * kRowStride;
  constexpr int64_t kGroup = kPanelGroup, ldc = kGroup * kPanelColumns;
  Acc* left = static_cast<Acc*>(scratch);
  Acc* c = left + blocks * left_size;
  Acc* right = c + blocks * kMaxRows * ldc;
  const auto first_row = [&](int64_t block) { return task.rows * block / blocks; };
  for (int64_t i = 0; i < blocks; ++i) {
    Acc* to = left + i * left_size;
    const int64_t m = first_row(i);
    pack_left<T>(task.a, task.first_row + m, first_row(i + 1) - m, depth, to);
    if (even_depth > depth)
      for (int j = 0; j < kRowStride; ++j) to[depth * kRowStride + j] = 0;
  }
  const int64_t panel_size = round_up(depth, kPackedDepth) * kPanelColumns;
  for (int64_t p = task.first_panel; p < task.end_panel; p += kGroup) {
    const int64_t count = smaller(kGroup, task.end_panel - p);
    bool done = false;
    if constexpr (kPaired<T>) {
      if (task.packed && blocks <= kDirectBlocks) {
        const auto* from =
            static_cast<const uint32_t*>(task.packed) + p * panel_size / 2;  // words, not elements
        for (int64_t j = 0; j < count; j += 2)
          for (int64_t i = 0; i < blocks; ++i) {
            const int64_t m = first_row(i);
            multiply_packed<T>(first_row(i + 1) - m, left + i * left_size,
                               from + j * panel_size / 2, panel_size / 2, even_depth,
                               smaller(2, count - j), c + m * ldc + j * kPanelColumns, ldc);
          }
        done = true;
      }
    }
    for (int64_t k = 0; !done && (k < depth || k == 0); k += kPanelDepth) {
      const int64_t some = smaller(kPanelDepth, depth - k);
      const Acc* panels[kGroup];
      for (int64_t j = 0; j < count; ++j) {
        Acc* to = right + j * kPanelDepth * kPanelColumns;
        const T* packed = static_cast<const T*>(task.packed) + (p + j) * panel_size;
        panels[j] = to;
        if (!task.packed)
          pack_right<T>(task.b, p + j, task.columns, k, some, to);
        else if constexpr (kPaired<T>)
          widen_panel(packed, k, some, to);
        else
          panels[j] = packed + k * kPanelColumns;
      }
      // One panel's part stays in the first-level cache while all blocks pass over it.
      for (int64_t j = 0; j < count; ++j) {
        // Packed weights come from far away: the first block asks for those that are next.
        const bool deeper = k + kPanelDepth < depth;
        const bool has_next = task.packed && (deeper || p + j + kGroup < task.end_panel);
        const T* next = static_cast<const T*>(task.packed) +
                        (p + j + (deeper ? 0 : kGroup)) * panel_size +
                        (deeper ? (k + kPanelDepth) * kPanelColumns : 0);
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t m = first_row(i);
          const bool asks = has_next && i == 0;
          multiply_panel(first_row(i + 1) - m, left + i * left_size + k * kRowStride, panels[j],
                         some, c + m * ldc + j * kPanelColumns, ldc, k == 0,
                         reinterpret_cast<const char*>(asks ? next : nullptr),
                         asks ? int64_t{kPanelColumns * sizeof(T)} : 0);
        }
      }
    }
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t j = 0; j < count; ++j) {
        const int64_t m = first_row(i);
        epilogue(m, first_row(i + 1) - m, p + j, c + m * ldc + j * kPanelColumns, ldc);
      }
  }
}

template <typename T, typename Epilogue>
MERGEME_INLINE void multiply_panels(const PanelTask& task, void* scratch, Epilogue epilogue) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bfloat16_t>)
    multiply_panels_by_tiles(task, scratch, epilogue);
  else
#elif defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16_t>)
    multiply_panels_by_dots(task, scratch, epilogue);
  else
#endif
    multiply_panels_by_vectors<T>(task, scratch, epilogue);
}

// An epilogue: out[row, panel's columns] = c, rounded to Out.
template <typename Out, typename Acc>
MERGEME_INLINE void store_panel(Out* out, int64_t ldo, int64_t rows, int64_t columns, const Acc* c,
                                int64_t ldc) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kWidth) {
      const auto value = load(c + r * ldc + j);
      if (columns - j >= kWidth)
        store(out + r * ldo + j, value);
      else
        store_some(out + r * ldo + j, value, columns - j);
    }
}

}  // namespace
}  // namespace mergeme
