// The K <= 16 largest keys of each row of a tile, in order, for cpu_loops.cpp. Torch-free.
//
// A row's keys are cut into 16 columns, key i in column i % 16. At least K keys are not below the
// K-th largest of the columns' largest keys, and of random rows few are: 10 on average for K = 8,
// with 64 experts as with 256. These candidates are collected and sorted. Both sorts run on a tile
// of rows at once, one in each lane of a vector.
#pragma once
#include <array>
#include <bit>

#include "csrc/common/cpu_vector.h"
#include "csrc/common/order_key.h"

namespace mergeme::topk_gating {
namespace {

constexpr int kColumns = 16;                     // and the largest K
constexpr int kTile = ::mergeme::kLanes<float>;  // rows of a tile
constexpr int kMaxCandidates = 64;               // of a row; one with more is searched K times

static_assert(kColumns % kTile == 0);

// Green's network of 60 comparators, which sorts 16 numbers.
struct Pair {
  int a, b;
};
constexpr std::array<Pair, 60> kNetwork{{
    {0, 1},   {2, 3},  {4, 5},   {6, 7},   {8, 9},   {10, 11}, {12, 13}, {14, 15}, {0, 2},  {1, 3},
    {4, 6},   {5, 7},  {8, 10},  {9, 11},  {12, 14}, {13, 15}, {0, 4},   {1, 5},   {2, 6},  {3, 7},
    {8, 12},  {9, 13}, {10, 14}, {11, 15}, {0, 8},   {1, 9},   {2, 10},  {3, 11},  {4, 12}, {5, 13},
    {6, 14},  {7, 15}, {5, 10},  {6, 9},   {3, 12},  {13, 14}, {4, 8},   {7, 11},  {1, 2},  {1, 4},
    {7, 13},  {2, 8},  {11, 14}, {2, 4},   {5, 6},   {9, 10},  {11, 13}, {3, 8},   {7, 12}, {6, 8},
    {10, 12}, {3, 5},  {7, 9},   {3, 4},   {5, 6},   {7, 8},   {9, 10},  {11, 12}, {6, 7},  {8, 9},
}};

MERGEME_INLINE IntVector load_keys(const int32_t* p) {
  IntVector v;
  memcpy(&v, p, sizeof v);
  return v;
}
MERGEME_INLINE void store_keys(int32_t* p, IntVector v) { memcpy(p, &v, sizeof v); }
MERGEME_INLINE IntVector larger(IntVector a, IntVector b) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVector>(
      _mm512_maskz_max_epi32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVector>(
      _mm256_max_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

MERGEME_INLINE IntVector smaller(IntVector a, IntVector b) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVector>(
      _mm512_maskz_min_epi32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVector>(
      _mm256_min_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return a > b ? b : a;
#endif
}

// first[0] and second[0] = the two largest of all lanes of both, in each lane first not below
// second.
template <int kHalf, size_t... kLane>
MERGEME_INLINE void fold_top2(IntVector& first, IntVector& second, std::index_sequence<kLane...>) {
  const IntVector a = __builtin_shufflevector(first, first, (int(kLane) ^ kHalf)...);
  const IntVector b = __builtin_shufflevector(second, second, (int(kLane) ^ kHalf)...);
  second = larger(smaller(first, a), larger(second, b));
  first = larger(first, a);
}
template <int kHalf = kTile / 2>
MERGEME_INLINE void fold_top2(IntVector& first, IntVector& second) {
  if constexpr (kHalf > 0) {
    fold_top2<kHalf>(first, second, std::make_index_sequence<kTile>{});
    fold_top2<kHalf / 2>(first, second);
  }
}

// Columns of a matrix as rows: to[c][r] = from[r * stride + c] for 16 columns and kTile rows.
MERGEME_INLINE void transpose_tile(const int32_t* from, int64_t stride, IntVector (&to)[kColumns]) {
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c += kTile) {
    FloatVector square[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
      square[r] = reinterpret_cast<FloatVector>(load_keys(from + r * stride + c));
    transpose<float>(square);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) to[c + r] = reinterpret_cast<IntVector>(square[r]);
  }
}

// The larger to a.
MERGEME_INLINE void exchange(IntVector& a, IntVector& b) {
  const IntVector upper = larger(a, b);
  b = smaller(a, b);
  a = upper;
}
// The larger key to a; of equal ones that with the lower id.
MERGEME_INLINE void exchange(IntVector& a, IntVector& b, IntVector& a_id, IntVector& b_id) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  const __m512i i = reinterpret_cast<__m512i>(a_id), j = reinterpret_cast<__m512i>(b_id);
  const __mmask16 tie = _mm512_mask_cmpeq_epi32_mask(_mm512_cmplt_epi32_mask(j, i), x, y);
  const __mmask16 swap = _mm512_kor(_mm512_cmpgt_epi32_mask(y, x), tie);
  a = reinterpret_cast<IntVector>(_mm512_maskz_max_epi32(0xffff, x, y));
  b = reinterpret_cast<IntVector>(_mm512_maskz_min_epi32(0xffff, x, y));
  a_id = reinterpret_cast<IntVector>(_mm512_mask_blend_epi32(swap, i, j));
  b_id = reinterpret_cast<IntVector>(_mm512_mask_blend_epi32(swap, j, i));
#else
  const IntVector swap = (b > a) | ((a == b) & (b_id < a_id));
  const IntVector key = swap ? b : a, id = swap ? b_id : a_id;
  b = swap ? a : b;
  b_id = swap ? a_id : b_id;
  a = key;
  a_id = id;
#endif
}
template <size_t... kPair>
MERGEME_INLINE void sort_columns(IntVector (&keys)[kColumns], std::index_sequence<kPair...>) {
  (exchange(keys[kNetwork[kPair].a], keys[kNetwork[kPair].b]), ...);
}
template <size_t... kPair>
MERGEME_INLINE void sort_columns(IntVector (&keys)[kColumns], IntVector (&ids)[kColumns],
                                 std::index_sequence<kPair...>) {
  (exchange(keys[kNetwork[kPair].a], keys[kNetwork[kPair].b], ids[kNetwork[kPair].a],
            ids[kNetwork[kPair].b]),
   ...);
}
using Network = std::make_index_sequence<kNetwork.size()>;

// A row's candidates in the order of their ids, then keys that no expert has.
struct Candidates {
  int32_t keys[kMaxCandidates + 16];
  int32_t ids[kMaxCandidates + 16];
  int32_t count;  // may exceed kMaxCandidates: then only that it does is known
};

// The keys of `padded` (a multiple of 32) that are not below `least`.
MERGEME_INLINE void collect(const int32_t* keys, int64_t padded, int32_t least, Candidates& to) {
  int32_t count = 0;
#if defined(__AVX512F__)
  const __m512i none = _mm512_set1_epi32(kTakenKey<float>), bound = _mm512_set1_epi32(least);
  __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512i some = _mm512_loadu_si512(keys + i);
    const __mmask16 mask = _mm512_cmpge_epi32_mask(some, bound);
    const int32_t at = count < kMaxCandidates ? count : kMaxCandidates;
    _mm512_storeu_si512(to.keys + at, _mm512_mask_compress_epi32(none, mask, some));
    _mm512_storeu_si512(to.ids + at, _mm512_maskz_compress_epi32(mask, ids));
    count += __builtin_popcount(mask);
    ids = _mm512_add_epi32(ids, _mm512_set1_epi32(16));
  }
#else
  for (int64_t begin = 0; begin < padded && count <= kMaxCandidates; begin += 32) {
    uint32_t mask = 0;
#if defined(__AVX2__)
    for (int i = 0; i < 32; i += 8) {
      const __m256i below = _mm256_cmpgt_epi32(
          _mm256_set1_epi32(least),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + begin + i)));
      mask |= uint32_t(~_mm256_movemask_ps(_mm256_castsi256_ps(below)) & 0xff) << i;
    }
#else
    for (int i = 0; i < 32; ++i) mask |= uint32_t(keys[begin + i] >= least) << i;
#endif
    for (; mask != 0 && count < kMaxCandidates; mask &= mask - 1) {
      const int32_t id = static_cast<int32_t>(begin) + std::countr_zero(mask);
      to.keys[count] = keys[id];
      to.ids[count++] = id;
    }
    count += mask != 0;
  }
  const int32_t end = count < kMaxCandidates ? count : kMaxCandidates;
  for (int i = 0; i < 16; ++i) {
    to.keys[end + i] = kTakenKey<float>;
    to.ids[end + i] = 0;
  }
#endif
  to.count = count;
}

// Reduces more than 16 candidates to the first K, in order.
MERGEME_INLINE void sort_one(Candidates& row, int top_k) {
  int32_t rank[kMaxCandidates] = {}, keys[kMaxCandidates], ids[kMaxCandidates];
  const int count = row.count;
  for (int j = 0; j < count; ++j)
    for (int i = 0; i < count; ++i)
      rank[i] += (row.keys[j] > row.keys[i]) | ((row.keys[j] == row.keys[i]) & (j < i));
  for (int i = 0; i < count; ++i) {
    keys[rank[i]] = row.keys[i];
    ids[rank[i]] = row.ids[i];
  }
  for (int k = 0; k < kColumns; ++k) {
    row.keys[k] = k < top_k ? keys[k] : kTakenKey<float>;
    row.ids[k] = ids[k];
  }
}
// The same for a row with so many candidates that not all were kept: K searches of all its keys,
// which it spoils.
MERGEME_INLINE void search(int32_t* keys, int64_t padded, Candidates& row, int top_k) {
  for (int k = 0; k < kColumns; ++k) row.keys[k] = kTakenKey<float>;
  for (int k = 0; k < top_k; ++k) {
    IntVector best = load_keys(keys);
    for (int64_t i = kTile; i < padded; i += kTile) best = larger(best, load_keys(keys + i));
    int32_t key = best[0];
    for (int l = 1; l < kTile; ++l) key = best[l] > key ? best[l] : key;
    int32_t id = 0;
    while (keys[id] != key) ++id;
    row.keys[k] = key;
    row.ids[k] = id;
    keys[id] = kTakenKey<float>;
  }
}

// matrix holds `padded` keys for each row r < count, a multiple of 32, those behind the experts'
// kTakenKey; it may be spoiled. Writes to keys[k][r] and ids[k][r] for k < K the k-th largest key
// of row r and where it stands; of equal ones the first comes first.
MERGEME_INLINE void select_top(int32_t* matrix, int count, int64_t padded, int top_k,
                               int32_t (&keys)[kColumns][kTile], int32_t (&ids)[kColumns][kTile]) {
  int32_t largest[kTile][kColumns] = {}, least[kTile];
  Candidates rows[kTile];
  for (int r = 0; r < count; ++r) {
    const int32_t* row = matrix + r * padded;
    IntVector columns[kColumns / kTile];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns / kTile; ++c) columns[c] = load_keys(row + c * kTile);
    for (int64_t i = kColumns; i < padded; i += kColumns)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns / kTile; ++c)
        columns[c] = larger(columns[c], load_keys(row + i + c * kTile));
#pragma GCC unroll 4
    for (int c = 0; c < kColumns / kTile; ++c) store_keys(largest[r] + c * kTile, columns[c]);
  }
  IntVector sorted[kColumns], sorted_ids[kColumns];
  transpose_tile(largest[0], kColumns, sorted);
  sort_columns(sorted, Network{});
  store_keys(least, sorted[top_k - 1]);
  for (int r = 0; r < count; ++r) collect(matrix + r * padded, padded, least[r], rows[r]);
  constexpr int64_t kStride = sizeof(Candidates) / sizeof(int32_t);
  for (int r = count; r < kTile; ++r) rows[r] = rows[0];
  for (int r = 0; r < count; ++r) {
    if (rows[r].count <= kColumns) continue;
    if (rows[r].count <= kMaxCandidates)
      sort_one(rows[r], top_k);
    else
      search(matrix + r * padded, padded, rows[r], top_k);
  }
  transpose_tile(rows[0].keys, kStride, sorted);
  transpose_tile(rows[0].ids, kStride, sorted_ids);
  sort_columns(sorted, sorted_ids, Network{});
#pragma GCC unroll 16
  for (int k = 0; k < kColumns; ++k) {
    store_keys(keys[k], sorted[k]);
    store_keys(ids[k], sorted_ids[k]);
  }
}

}  // namespace
}  // namespace mergeme::topk_gating
