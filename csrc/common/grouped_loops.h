// Blocks of a grouped matrix product on one CPU thread. Torch-free.
//
// Included only by cpu_loops.cpp files (see cpu_vector.h for why all of it is internal). Every
// block computes c[w, v] = sum over k of W[w, k] V[v, k]: W's values are broadcast, V's fill
// vectors. Each c is one chain of multiply-adds over ascending k, so that it depends neither on how
// the product was cut into blocks nor on the number of threads; only the path for few rows, which
// sums along k in vectors, has another (also fixed) order.
#pragma once
#include "csrc/common/cpu_vector.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme {
namespace {

// Values of W per step of the inner loop: with two vectors of V, as many sums as registers allow.
#if defined(__AVX512F__)
constexpr int kBroadcasts = 12;
#elif defined(__AVX2__)
constexpr int kBroadcasts = 6;
#else
constexpr int kBroadcasts = 4;
#endif
static_assert(kBroadcasts <= kMaxBroadcasts && kVectorBytes <= kMaxVectorBytes);
// Distance of W's rows in its packed block; the 16 keep them out of each other's cache sets.
constexpr int64_t kStride = kBlockDepth + 16;

MERGEME_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MERGEME_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <typename Acc>
struct Buffers {
  explicit MERGEME_INLINE Buffers(void* scratch)
      : v(static_cast<Acc*>(scratch)),
        w(v + kBlockDepth * kMaxBlockV),
        c(w + kMaxBroadcasts * kStride) {}
  Acc* v;  // panels of two vectors, each [depth, 2 * kLanes]; the last may be one vector wide
  Acc* w;  // [kBroadcasts, kStride], or [depth, kBroadcasts] interleaved
  Acc* c;  // [round_up(num_w, kBroadcasts), round_up(num_v, kLanes)]
};

// c[j, :] (+)= sum over k of w[j, k] * v[k, :], for kBroadcasts j and kVectors vectors.
template <int kVectors, bool kInterleaved, typename Acc>
void multiply_panel(const Acc* v, const Acc* w, int64_t depth, Acc* c, int64_t ldc, bool first) {
  constexpr int kWidth = kLanes<Acc>;
  vector_t<Acc> sum[kBroadcasts][kVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kBroadcasts; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i)
      sum[j][i] = first ? vector_t<Acc>{} : load(c + j * ldc + i * kWidth);
  for (int64_t k = 0; k < depth; ++k) {
    vector_t<Acc> x[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) x[i] = load(v + (k * kVectors + i) * kWidth);
#pragma GCC unroll 16
    for (int j = 0; j < kBroadcasts; ++j) {
      const auto y = broadcast(kInterleaved ? w[k * kBroadcasts + j] : w[j * kStride + k]);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) sum[j][i] = fma(x[i], y, sum[j][i]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kBroadcasts; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) store(c + j * ldc + i * kWidth, sum[j][i]);
}

// Fills buffers.c. pack_v(k, depth) fills buffers.v, pack_w(w, k, depth) fills buffers.w.
template <bool kInterleaved, typename Acc, typename PackV, typename PackW>
MERGEME_INLINE void multiply_block(const Buffers<Acc>& buffers, int64_t num_w, int64_t num_v,
                                   int64_t depth, PackV pack_v, PackW pack_w) {
  constexpr int64_t kWidth = kLanes<Acc>;
  const int64_t ldc = round_up(num_v, kWidth);
  if (depth == 0)
    for (int64_t i = 0; i < round_up(num_w, kBroadcasts) * ldc; ++i) buffers.c[i] = 0;
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    const int64_t some = smaller(kBlockDepth, depth - k);
    pack_v(k, some);
    for (int64_t w = 0; w < num_w; w += kBroadcasts) {
      pack_w(w, k, some);
      for (int64_t v = 0; v < num_v; v += 2 * kWidth) {
        const Acc* panel = buffers.v + v * some;
        Acc* c = buffers.c + w * ldc + v;
        if (num_v - v > kWidth)
          multiply_panel<2, kInterleaved>(panel, buffers.w, some, c, ldc, k == 0);
        else
          multiply_panel<1, kInterleaved>(panel, buffers.w, some, c, ldc, k == 0);
      }
    }
  }
}

// Rows that are contiguous along k, each given by its address, become panels with k outermost.
template <typename T, typename Acc>
void pack_rows_as_panels(const T* const* rows, int64_t num_rows, int64_t k, int64_t depth,
                         Acc* out) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t r = 0; r < num_rows; r += kWidth) {
    const int64_t panel = r / (2 * kWidth) * (2 * kWidth);
    const bool wide = num_rows - panel > kWidth;
    Acc* to = out + panel * depth + (r - panel);
    const int64_t step = wide ? 2 * kWidth : kWidth, count = smaller(kWidth, num_rows - r);
    for (int64_t i = 0; i < depth; i += kWidth) {
      const int64_t some = smaller(kWidth, depth - i);
      vector_t<Acc> square[kWidth];
      for (int64_t j = 0; j < kWidth; ++j)
        square[j] = j >= count       ? vector_t<Acc>{}
                    : some == kWidth ? load(rows[r + j] + k + i)
                                     : load_some(rows[r + j] + k + i, some);
      transpose<Acc>(square);
      if (some == kWidth) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < kWidth; ++j) store(to + (i + j) * step, square[j]);
      } else {
        for (int64_t j = 0; j < some; ++j) store(to + (i + j) * step, square[j]);
      }
    }
  }
}

// A matrix whose rows run over k: `count` of its columns become panels.
template <typename T, typename Acc>
void pack_columns_as_panels(const T* from, int64_t ld, int64_t count, int64_t depth, Acc* out) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t v = 0; v < count; v += kWidth) {
    const int64_t panel = v / (2 * kWidth) * (2 * kWidth);
    Acc* to = out + panel * depth + (v - panel);
    const int64_t step = count - panel > kWidth ? 2 * kWidth : kWidth;
    const int64_t some = smaller(kWidth, count - v);
    for (int64_t k = 0; k < depth; ++k)
      store(to + k * step,
            some == kWidth ? load(from + k * ld + v) : load_some(from + k * ld + v, some));
  }
}

// row(j) is the address of W's row w + j at k = 0, or null past the last.
template <typename T, typename Acc, typename Row>
MERGEME_INLINE void pack_rows(Row row, int64_t k, int64_t depth, Acc* out) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int j = 0; j < kBroadcasts; ++j) {
    const T* from = row(j);
    Acc* to = out + j * kStride;
    if (!from) {
      for (int64_t i = 0; i < depth; ++i) to[i] = 0;
      continue;
    }
    int64_t i = 0;
    for (; i + kWidth <= depth; i += kWidth) store(to + i, load(from + k + i));
    if (i < depth) store(to + i, load_some(from + k + i, depth - i));
  }
}

// Few rows of A: streams W's rows once, without packing them, and sums along k in vectors.
// rows: [num_rows, round_up(depth)] already in the accumulation type and padded with zeros.
template <int kRows, typename T, typename Acc, typename Row>
MERGEME_INLINE void dot_rows(const Acc* rows, int64_t ld, int64_t depth, Row row, Acc* c,
                             int64_t ldc) {
  constexpr int kColumns = kBroadcasts / 2;
  constexpr int64_t kWidth = kLanes<Acc>;
  const T* from[kColumns];
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) from[j] = row(j);
  vector_t<Acc> sum[kColumns][kRows] = {};
  const auto step = [&](int64_t k, auto read) __attribute__((always_inline)) {
    vector_t<Acc> x[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = load(rows + i * ld + k);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const vector_t<Acc> y = read(from[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[j][i] = fma(x[i], y, sum[j][i]);
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) step(k, [](const T* p) { return load(p); });
  if (k < depth) step(k, [&](const T* p) { return load_some(p, depth - k); });
  for (int j = 0; j < kColumns; ++j)
    for (int i = 0; i < kRows; ++i) c[j * ldc + i] = sum_lanes<Acc>(sum[j][i]);
}

// c[w, r] = sum over k of W[w, k] rows[r, k]: both contiguous along k. row(w) gives the address of
// W's row for any w below round_up(num_w, kBroadcasts): null past the last, never for a w that is a
// multiple of kBroadcasts / 2.
template <typename T, typename Row>
MERGEME_INLINE void multiply_rows(const T* const* rows, int64_t num_rows, int64_t num_w,
                                  int64_t depth, Row row, const Buffers<acc_t<T>>& buffers) {
  using Acc = acc_t<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  const int64_t ld = round_up(depth, kWidth), ldc = round_up(num_rows, kWidth);
  if (num_rows <= kFewRows && num_rows * ld <= kBlockDepth * kMaxBlockV && depth > 0) {
    for (int64_t r = 0; r < num_rows; ++r) {
      int64_t k = 0;
      for (; k + kWidth <= depth; k += kWidth) store(buffers.v + r * ld + k, load(rows[r] + k));
      if (k < depth) store(buffers.v + r * ld + k, load_some(rows[r] + k, depth - k));
    }
    for (int64_t w = 0; w < num_w; w += kBroadcasts / 2) {
      const T* safe = row(w);  // rows past the end repeat one; what they give is not read
      const auto nth = [&](int j) __attribute__((always_inline)) {
        const T* p = row(w + j);
        return p ? p : safe;
      };
      for (int64_t r = 0; r < num_rows; r += 4) {
        const Acc* x = buffers.v + r * ld;
        Acc* c = buffers.c + w * ldc + r;
        switch (num_rows - r) {
          case 1:
            dot_rows<1, T>(x, ld, depth, nth, c, ldc);
            break;
          case 2:
            dot_rows<2, T>(x, ld, depth, nth, c, ldc);
            break;
          case 3:
            dot_rows<3, T>(x, ld, depth, nth, c, ldc);
            break;
          default:
            dot_rows<4, T>(x, ld, depth, nth, c, ldc);
        }
      }
    }
    return;
  }
  multiply_block<false>(
      buffers, num_w, num_rows, depth,
      [&](int64_t k, int64_t some) { pack_rows_as_panels(rows, num_rows, k, some, buffers.v); },
      [&](int64_t w, int64_t k, int64_t some) {
        pack_rows<T>([&](int j) { return row(w + j); }, k, some, buffers.w);
      });
}

// out[r, w] = value(w, r): transposes squares of vectors on their way out. value(w, r) returns the
// vector over rows r, r + 1, ... of column w.
template <typename Out, typename Value>
MERGEME_INLINE void store_transposed(Out* out, int64_t ld, int64_t num_rows, int64_t num_columns,
                                     Value value) {
  using Acc = acc_t<Out>;
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t r = 0; r < num_rows; r += kWidth)
    for (int64_t w = 0; w < num_columns; w += kWidth) {
      const int64_t some = smaller(kWidth, num_columns - w), count = smaller(kWidth, num_rows - r);
      vector_t<Acc> square[kWidth];
      for (int64_t j = 0; j < kWidth; ++j) square[j] = j < some ? value(w + j, r) : vector_t<Acc>{};
      transpose<Acc>(square);
      for (int64_t i = 0; i < count; ++i) {
        Out* to = out + (r + i) * ld + w;
        if (some == kWidth)
          store(to, square[i]);
        else
          store_some(to, square[i], some);
      }
    }
}

// out = a b^T for one block: a [rows, depth], b [columns, depth].
template <typename T, typename Out = T>
void multiply_nt_block(const GroupedBlock& block, void* scratch) {
  const Buffers<acc_t<T>> buffers(scratch);
  const T* rows[kMaxBlockV];
  for (int64_t r = 0; r < block.rows; ++r) rows[r] = static_cast<const T*>(block.a) + r * block.lda;
  multiply_rows<T>(
      rows, block.rows, block.columns, block.depth,
      [&](int64_t w) {
        return w < block.columns ? static_cast<const T*>(block.b) + w * block.ldb : nullptr;
      },
      buffers);
  const int64_t ldc = round_up(block.rows, kLanes<acc_t<T>>);
  store_transposed(static_cast<Out*>(block.out), block.ldo, block.rows, block.columns,
                   [&](int64_t w, int64_t r) { return load(buffers.c + w * ldc + r); });
}

// out[w, v] for one block whose sums already run along v.
template <typename T>
MERGEME_INLINE void store_rows(const GroupedBlock& block, const acc_t<T>* c) {
  constexpr int64_t kWidth = kLanes<acc_t<T>>;
  const int64_t ldc = round_up(block.columns, kWidth);
  for (int64_t w = 0; w < block.rows; ++w)
    for (int64_t v = 0; v < block.columns; v += kWidth) {
      T* to = static_cast<T*>(block.out) + w * block.ldo + v;
      const auto value = load(c + w * ldc + v);
      if (v + kWidth <= block.columns)
        store(to, value);
      else
        store_some(to, value, block.columns - v);
    }
}

// out = a b for one block: a [rows, depth], b [depth, columns].
template <typename T>
void multiply_nn_block(const GroupedBlock& block, void* scratch) {
  const Buffers<acc_t<T>> buffers(scratch);
  const T* a = static_cast<const T*>(block.a);
  const T* b = static_cast<const T*>(block.b);
  multiply_block<false>(
      buffers, block.rows, block.columns, block.depth,
      [&](int64_t k, int64_t some) {
        pack_columns_as_panels(b + k * block.ldb, block.ldb, block.columns, some, buffers.v);
      },
      [&](int64_t w, int64_t k, int64_t some) {
        pack_rows<T>([&](int j) { return w + j < block.rows ? a + (w + j) * block.lda : nullptr; },
                     k, some, buffers.w);
      });
  store_rows<T>(block, buffers.c);
}

// out = a^T b for one block: a [depth, rows], b [depth, columns].
template <typename T>
void multiply_tn_block(const GroupedBlock& block, void* scratch) {
  const Buffers<acc_t<T>> buffers(scratch);
  const T* a = static_cast<const T*>(block.a);
  const T* b = static_cast<const T*>(block.b);
  multiply_block<true>(
      buffers, block.rows, block.columns, block.depth,
      [&](int64_t k, int64_t some) {
        pack_columns_as_panels(b + k * block.ldb, block.ldb, block.columns, some, buffers.v);
      },
      [&](int64_t w, int64_t k, int64_t some) {
        const int64_t count = smaller(kBroadcasts, block.rows - w);
        for (int64_t i = 0; i < some; ++i)
          for (int64_t j = 0; j < kBroadcasts; ++j)
            buffers.w[i * kBroadcasts + j] =
                j < count ? to_acc(a[(k + i) * block.lda + w + j]) : acc_t<T>{0};
      });
  store_rows<T>(block, buffers.c);
}

}  // namespace
}  // namespace mergeme
