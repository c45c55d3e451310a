#include "csrc/ops/topk_gating/cpu_loops.h"

#include "csrc/ops/topk_gating/cpu_select.h"

namespace mergeme::topk_gating::MERGEME_ISA {
namespace {

template <typename A>
struct Row {
  A* logits;           // padded with -inf, whose share is 0
  key_t<A>* keys;      // padded with kTakenKey
  A* selected;         // logits of the selected, padded with what adds nothing to a sum
  key_t<A>* best;      // largest key of each block of kLanes
  key_t<A>* groups;    // of a group; kTakenKey if it is among the chosen
  A* shares;           // of the logits, where all are needed
  int32_t num_blocks;  // of logits and keys
  bool has_nan;

  Row(double* room, int64_t num_experts, int64_t top_k, int64_t num_groups, A neutral)
      : logits(reinterpret_cast<A*>(room)),
        keys(reinterpret_cast<key_t<A>*>(room + padded(num_experts))),
        selected(reinterpret_cast<A*>(room + 2 * padded(num_experts))),
        best(reinterpret_cast<key_t<A>*>(room + 2 * padded(num_experts) + padded(top_k + 1))),
        groups(best + padded(ceil_div(num_experts, kLanes))),
        shares(reinterpret_cast<A*>(groups + 2 * padded(num_groups))),
        num_blocks(static_cast<int32_t>(ceil_div(num_experts, kLanes))),
        has_nan(false) {
    // Once for all rows: nothing writes to the padding.
    for (int64_t e = num_experts; e < padded(num_experts); ++e) {
      logits[e] = minus_infinity<A>();
      keys[e] = kTakenKey<A>;
    }
    for (int64_t k = top_k; k < padded(top_k); ++k) selected[k] = neutral;
  }
};

template <typename A>
struct Normalizer {
  A top, sum;
};

// lanes[0] = all lanes folded, halves onto halves; unrolled, so that each step is one vector.
template <typename A, typename F>
inline __attribute__((always_inline)) A fold(A* lanes, F&& combine) {
#pragma GCC unroll 5
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}

// Over n items padded to whole blocks, in the order that scores.h states. Keeps the shares, if
// there is room for them.
template <Score S, typename A>
Normalizer<A> normalizer(const A* z, int64_t n, A* shares = nullptr) {
  const auto largest = [](A x, A y) { return y > x ? y : x; };
  A lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = level<S>(z[l]);
  for (int l = 0; l < kLanes; ++l) lanes[l] = largest(minus_infinity<A>(), lanes[l]);
  for (int64_t i = kLanes; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = largest(lanes[l], level<S>(z[i + l]));
  const A top = finite_top(fold(lanes, largest));
  for (int l = 0; l < kLanes; ++l) lanes[l] = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    A block[kLanes];
    for (int l = 0; l < kLanes; ++l) block[l] = share<S>(z[i + l], top);
    for (int l = 0; l < kLanes; ++l) lanes[l] += block[l];
    if (shares != nullptr) memcpy(shares + i, block, sizeof block);
  }
  return {top, usable_sum<S>(top, fold(lanes, [](A x, A y) { return x + y; }))};
}

template <typename T, typename A>
void load(const T* from, A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_acc(from[i]);
}

template <typename Key>
Key block_max(const Key* keys) {
  Key best = keys[0];
  for (int l = 1; l < kLanes; ++l) best = keys[l] > best ? keys[l] : best;
  return best;
}

// Position of the first of n keys that equals `key`, which is among them.
template <typename Key>
int32_t first_equal(const Key* keys, int32_t n, Key key) {
  int32_t first = n;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t at = keys[i] == key ? i : n;
    first = at < first ? at : first;
  }
  return first;
}

// One round: the largest of the blocks' largest keys, its first block, its first place there. Marks
// it as taken.
template <typename A>
int32_t take(Row<A>& row) {
  key_t<A> best = row.best[0];
  for (int32_t b = 1; b < row.num_blocks; ++b) best = row.best[b] > best ? row.best[b] : best;
  const int32_t block = row.num_blocks == 1 ? 0 : first_equal(row.best, row.num_blocks, best);
  key_t<A>* keys = row.keys + block * int64_t{kLanes};
  const int32_t place = first_equal(keys, kLanes, best);
  keys[place] = kTakenKey<A>;
  row.best[block] = block_max(keys);
  row.has_nan |= best == kNanKey<A>;
  return block * kLanes + place;
}

template <typename A>
void gather_selected(const Row<A>& row, const int32_t* ids, int64_t top_k) {
  for (int64_t k = 0; k < top_k; ++k) row.selected[k] = row.logits[ids[k]];
}

// What the choice compares, for n experts. `shares` are the row's if it needed all of them.
template <Score S, typename A>
void make_keys(const Params& p, const A* logits, const A* shares, A sum, key_t<A>* keys) {
  const int64_t n = p.num_experts;
  const A inverse = A(1) / sum;
  if (p.bias == nullptr)  // the logits' order is the scores', without the ties that rounding makes
    for (int64_t e = 0; e < n; ++e) keys[e] = order_key(logits[e]);
  else if constexpr (S == Score::kSoftmax)
    for (int64_t e = 0; e < n; ++e) keys[e] = order_key(shares[e] * inverse + A(p.bias[e]));
  else
    for (int64_t e = 0; e < n; ++e) keys[e] = order_key(choice_score<S>(logits[e]) + A(p.bias[e]));
}

// The two largest of n keys and those given.
template <typename Key>
void top2_of(const Key* keys, int64_t n, Key& first, Key& second) {
  int64_t i = 0;
  if constexpr (sizeof(Key) == sizeof(int32_t)) {
    if (n >= kTile) {
      IntVector a = load_keys(keys), b = load_keys(keys) & 0;
      b += kTakenKey<float>;
      for (i = kTile; i + kTile <= n; i += kTile) {
        const IntVector next = load_keys(keys + i);
        b = larger(b, smaller(a, next));
        a = larger(a, next);
      }
      fold_top2(a, b);
      first = a[0];
      second = b[0];
    }
  }
  for (; i < n; ++i) {
    const Key lower = keys[i] < first ? keys[i] : first;
    first = keys[i] > first ? keys[i] : first;
    second = lower > second ? lower : second;
  }
}

// Marks as taken the experts outside the top groups; of equal groups the lower ones are kept. The
// two best keys of a group give its score, as without a bias logits order like scores. `groups` has
// room for two keys of each group.
template <Score S, typename A>
void limit_groups(const Params& p, A top, key_t<A>* keys, key_t<A>* groups) {
  using Key = key_t<A>;
  const int64_t count = p.num_groups, size = p.num_experts / count;
  Key* second = groups + count;
  for (int64_t g = 0; g < count; ++g) {
    groups[g] = second[g] = kTakenKey<A>;
    top2_of(keys + g * size, size, groups[g], second[g]);
  }
  if (p.group_score == GroupScore::kTop2) {
    const bool biased = p.bias != nullptr;
    for (int64_t g = 0; g < count; ++g) groups[g] = top2_key<S>(groups[g], second[g], biased, top);
  }
  for (int64_t i = 0; i < p.top_groups; ++i) {
    Key largest = groups[0];
    for (int64_t g = 1; g < count; ++g) largest = groups[g] > largest ? groups[g] : largest;
    int64_t best = 0;
    while (groups[best] != largest) ++best;
    groups[best] = kTakenKey<A>;
  }
  for (int64_t g = 0; g < count; ++g) {
    const bool chosen = groups[g] == kTakenKey<A>;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) keys[e] = chosen ? keys[e] : kTakenKey<A>;
  }
}

// Loads a token and makes its keys. Returns the normalizer of the weights, if it is known already.
template <typename T, Score S, typename A>
Normalizer<A> prepare(const Params& p, int64_t t, Row<A>& row) {
  load(static_cast<const T*>(p.logits) + t * p.num_experts, row.logits, p.num_experts);
  Normalizer<A> all{A(0), A(1)};
  if (S == Score::kSoftmax && needs_all(p))
    all = normalizer<S>(row.logits, p.num_experts, row.shares);
  make_keys<S>(p, row.logits, row.shares, all.sum, row.keys);
  if (p.num_groups > 1) limit_groups<S>(p, all.top, row.keys, row.groups);
  for (int32_t b = 0; b < row.num_blocks; ++b)
    row.best[b] = block_max(row.keys + b * int64_t{kLanes});
  row.has_nan = false;
  return all;
}

template <Score S, typename A>
void write_weights(const Params& p, int64_t t, const Row<A>& row, Normalizer<A> all) {
  const A scale = static_cast<A>(p.scale);
  A* weights = static_cast<A*>(p.weights) + t * p.top_k;
  gather_selected(row, p.ids + t * p.top_k, p.top_k);
  if (p.renormalize) all = normalizer<S>(row.selected, p.top_k);
  if (S == Score::kSoftmax || p.renormalize)
    for (int64_t k = 0; k < p.top_k; ++k)
      weights[k] = share<S>(row.selected[k], all.top) / all.sum * scale;
  else
    for (int64_t k = 0; k < p.top_k; ++k) weights[k] = lone_score<S>(row.selected[k]) * scale;
  for (int64_t k = 0; row.has_nan && k < p.top_k; ++k)
    weights[k] = std::numeric_limits<A>::quiet_NaN();
}

// A round waits for the one before it, so rounds of kRows tokens are interleaved.
template <typename T, Score S>
void forward_rows(const Params& p, int64_t begin, int64_t end, double* room) {
  using A = acc_t<T>;
  const int64_t size = row_room(p.num_experts, p.top_k, p.num_groups);
  const auto row_at = [&](int r) {
    return Row<A>(room + r * size, p.num_experts, p.top_k, p.num_groups, neutral<S, A>());
  };
  Row<A> rows[kRows] = {row_at(0), row_at(1), row_at(2), row_at(3)};
  Normalizer<A> all[kRows];
  for (int64_t t = begin; t < end; t += kRows) {
    const int count = static_cast<int>(end - t < kRows ? end - t : kRows);
    for (int r = 0; r < count; ++r) all[r] = prepare<T, S>(p, t + r, rows[r]);
    for (int64_t k = 0; k < p.top_k; ++k)
      for (int r = 0; r < count; ++r) p.ids[(t + r) * p.top_k + k] = take(rows[r]);
    for (int r = 0; r < count; ++r) write_weights<S>(p, t + r, rows[r], all[r]);
  }
}

// Numbers of a tile: item k of row r.
using Tile = float[kColumns][kTile];

// lanes[0] = lanes 0 to 15 folded, halves onto halves. In a fold of 32 lanes, 16 of them without
// items, the same pairs meet.
template <typename F>
MERGEME_INLINE void fold_tile(Tile& lanes, F&& combine) {
#pragma GCC unroll 4
  for (int half = kColumns / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k)
      for (int r = 0; r < kTile; ++r) lanes[k][r] = combine(lanes[k][r], lanes[k + half][r]);
}

// shares[k][r] of K <= 16 items and, for each row, the largest level and the sum of the shares.
template <Score S>
MERGEME_INLINE void normalize_tile(const Tile& z, int top_k, Tile& shares, float* top, float* sum) {
  Tile lanes;
  for (int r = 0; r < kTile; ++r) top[r] = minus_infinity<float>();
  for (int k = 0; k < top_k; ++k)
    for (int r = 0; r < kTile; ++r) {
      const float x = level<S>(z[k][r]);
      top[r] = x > top[r] ? x : top[r];
    }
  for (int r = 0; r < kTile; ++r) top[r] = finite_top(top[r]);
  for (int k = 0; k < top_k; ++k)
    for (int r = 0; r < kTile; ++r) lanes[k][r] = shares[k][r] = share<S>(z[k][r], top[r]);
  for (int k = top_k; k < kColumns; ++k)
    for (int r = 0; r < kTile; ++r) lanes[k][r] = 0;
  fold_tile(lanes, [](float x, float y) { return x + y; });
  for (int r = 0; r < kTile; ++r) sum[r] = usable_sum<S>(top[r], lanes[0][r]);
}

// lanes[k][r] = rows[r][k].
MERGEME_INLINE void transpose_halves(const float (&rows)[kTile][kColumns], Tile& lanes) {
  IntVector columns[kColumns];
  transpose_tile(reinterpret_cast<const int32_t*>(rows[0]), kColumns, columns);
#pragma GCC unroll 16
  for (int k = 0; k < kColumns; ++k) store(lanes[k], reinterpret_cast<FloatVector>(columns[k]));
}

// The softmax's normalizer of each row of a tile, as normalizer() makes it, and the shares. Rows
// are `width` apart, a multiple of 32, and padded with -inf.
MERGEME_INLINE void normalize_rows(const float* z, int count, int64_t width, float* shares,
                                   float* top, float* sum) {
  constexpr Score S = Score::kSoftmax;
  constexpr int kHalf = kColumns / kTile;  // vectors
  float halves[kTile][kColumns] = {};
  Tile lanes;
  for (int r = 0; r < count; ++r) {
    FloatVector most[kHalf];
#pragma GCC unroll 4
    for (int c = 0; c < kHalf; ++c) most[c] = broadcast(minus_infinity<float>());
    for (int64_t e = 0; e < width; e += kColumns)
#pragma GCC unroll 4
      for (int c = 0; c < kHalf; ++c) {
        const FloatVector x = ::mergeme::load(z + r * width + e + c * kTile);
        most[c] = x > most[c] ? x : most[c];
      }
#pragma GCC unroll 4
    for (int c = 0; c < kHalf; ++c) store(halves[r] + c * kTile, most[c]);
  }
  transpose_halves(halves, lanes);
  fold_tile(lanes, [](float x, float y) { return y > x ? y : x; });
  for (int r = 0; r < count; ++r) top[r] = finite_top(lanes[0][r]);
  for (int r = 0; r < count; ++r) {
    const float* row = z + r * width;
    float* to = shares + r * width;
    FloatVector sums[2 * kHalf] = {};
    for (int64_t e = 0; e < width; e += kLanes) {
      for (int l = 0; l < kLanes; ++l) to[e + l] = share<S>(row[e + l], top[r]);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * kHalf; ++c) sums[c] += ::mergeme::load(to + e + c * kTile);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kHalf; ++c) store(halves[r] + c * kTile, sums[c] + sums[c + kHalf]);
  }
  transpose_halves(halves, lanes);
  fold_tile(lanes, [](float x, float y) { return x + y; });
  for (int r = 0; r < count; ++r) sum[r] = usable_sum<S>(top[r], lanes[0][r]);
}

// limit_groups for the rows of a tile, whose groups' keys are ranked together. `room` has two keys
// for each group of each row, padded to a multiple of 32.
template <Score S>
void limit_groups_of_tile(const Params& p, int count, int64_t width, const float* top,
                          int32_t* keys, int32_t* room) {
  const int64_t num_groups = p.num_groups, size = p.num_experts / num_groups;
  const int64_t row_size = padded(num_groups);
  int32_t *first = room, *second = room + kTile * row_size;
  for (int r = 0; r < count; ++r) {
    int32_t *a = first + r * row_size, *b = second + r * row_size;
    for (int64_t g = 0; g < row_size; ++g) a[g] = b[g] = kTakenKey<float>;
    for (int64_t g = 0; g < num_groups; ++g) top2_of(keys + r * width + g * size, size, a[g], b[g]);
    if (p.group_score == GroupScore::kMax) continue;
    const bool biased = p.bias != nullptr;
    for (int64_t g = 0; g < row_size; ++g) a[g] = top2_key<S>(a[g], b[g], biased, top[r]);
    for (int64_t g = num_groups; g < row_size; ++g) a[g] = kTakenKey<float>;
  }
  int32_t best[kColumns][kTile], chosen[kColumns][kTile];
  select_top(first, count, row_size, static_cast<int>(p.top_groups), best, chosen);
  int32_t* open = second;  // all bits set for the chosen groups of a row
  for (int r = 0; r < count; ++r) {
    for (int64_t g = 0; g < row_size; ++g) open[g] = 0;
    for (int64_t i = 0; i < p.top_groups; ++i) open[chosen[i][r]] = -1;
    for (int64_t g = 0; g < num_groups; ++g) {
      int32_t* group = keys + r * width + g * size;
      const int32_t mask = open[g], closed = kTakenKey<float> & ~mask;
      for (int64_t e = 0; e < size; ++e) group[e] = (group[e] & mask) | closed;
    }
  }
}

template <typename T>
MERGEME_INLINE void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) store(to + i, ::mergeme::load(from + i));
  for (; i < n; ++i) to[i] = to_acc(from[i]);
}

// The logits of a tile as rows of `width` floats, padded with -inf: themselves, if they are that
// already, or widened into `room`, whose padding is there.
template <typename T>
MERGEME_INLINE const float* logits_of_tile(const T* from, int count, int64_t n, int64_t width,
                                           float* room) {
  if constexpr (sizeof(T) == sizeof(float))
    if (n == width) return from;
  for (int r = 0; r < count; ++r) widen(from + r * n, room + r * width, n);
  return room;
}

// The forward pass for K <= 16 and float32 arithmetic, a tile of rows at once.
template <typename T, Score S>
void forward_tiles(const Params& p, int64_t begin, int64_t end, double* room) {
  const int64_t n = p.num_experts, width = padded(n);
  const int top_k = static_cast<int>(p.top_k);
  float* widened = reinterpret_cast<float*>(room);
  int32_t* keys = reinterpret_cast<int32_t*>(widened + kTile * width);
  float* shares = reinterpret_cast<float*>(keys + kTile * width);
  int32_t* groups = reinterpret_cast<int32_t*>(shares + kTile * width);
  const float scale = static_cast<float>(p.scale);
  const bool normalized = S == Score::kSoftmax || p.renormalize;
  for (int64_t e = n; e < width; ++e) {
    for (int r = 0; r < kTile; ++r) {
      widened[r * width + e] = minus_infinity<float>();
      keys[r * width + e] = kTakenKey<float>;
    }
  }
  for (int64_t t = begin; t < end; t += kTile) {
    const int count = static_cast<int>(end - t < kTile ? end - t : kTile);
    float top[kTile] = {}, sum[kTile];
    for (int r = 0; r < kTile; ++r) sum[r] = 1;
    const T* rows = static_cast<const T*>(p.logits) + t * n;
    const float* logits = logits_of_tile(rows, count, n, width, widened);
    if (S == Score::kSoftmax && needs_all(p))
      normalize_rows(logits, count, width, shares, top, sum);
    for (int r = 0; r < count; ++r)
      make_keys<S>(p, logits + r * width, shares + r * width, sum[r], keys + r * width);
    if (p.num_groups > 1 && p.top_groups <= kColumns)
      limit_groups_of_tile<S>(p, count, width, top, keys, groups);
    else if (p.num_groups > 1)
      for (int r = 0; r < count; ++r) limit_groups<S>(p, top[r], keys + r * width, groups);
    int32_t best[kColumns][kTile], ids[kColumns][kTile];
    select_top(keys, count, width, top_k, best, ids);
    Tile z = {}, v;
    for (int r = 0; r < count; ++r)
      for (int k = 0; k < top_k; ++k) z[k][r] = logits[r * width + ids[k][r]];
    if (p.renormalize) {
      normalize_tile<S>(z, top_k, v, top, sum);
    } else {
      for (int k = 0; k < top_k; ++k)
        for (int r = 0; r < kTile; ++r)
          v[k][r] = normalized ? share<S>(z[k][r], top[r]) : lone_score<S>(z[k][r]);
    }
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    for (int k = 0; k < top_k; ++k)
      for (int r = 0; r < kTile; ++r) {
        const float w = (normalized ? v[k][r] / sum[r] : v[k][r]) * scale;
        v[k][r] = best[0][r] == kNanKey<float> ? kNan : w;
      }
    int32_t* ids_out = p.ids + t * top_k;
    float* weights_out = static_cast<float*>(p.weights) + t * top_k;
    for (int r = 0; r < count; ++r)
      for (int k = 0; k < top_k; ++k) {
        ids_out[r * top_k + k] = ids[k][r];
        weights_out[r * top_k + k] = v[k][r];
      }
  }
}

// The closed forms of kernel.cuh, in the same order of operations.
template <typename T, Score S>
int64_t backward_rows(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  using A = acc_t<T>;
  const Row<A> row(room, p.num_experts, p.top_k, 0, neutral<S, A>());
  const A scale = static_cast<A>(p.scale);
  const bool normalized = S == Score::kSoftmax || p.renormalize;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* ids = p.ids + t * p.top_k;
    const A* grad = static_cast<const A*>(p.grad) + t * p.top_k;
    T* out = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    for (int64_t k = 0; k < p.top_k; ++k)
      if (ids[k] < 0 || ids[k] >= p.num_experts) return t * p.top_k + k;
    load(static_cast<const T*>(p.logits) + t * p.num_experts, row.logits, p.num_experts);
    gather_selected(row, ids, p.top_k);
    Normalizer<A> all{A(0), A(1)};
    A lanes[kLanes] = {};
    if (normalized) {
      all = p.renormalize ? normalizer<S>(row.selected, p.top_k)
                          : normalizer<S>(row.logits, p.num_experts);
      for (int64_t k = 0; k < p.top_k; ++k)
        lanes[k % kLanes] += share<S>(row.selected[k], all.top) / all.sum * grad[k];
      fold(lanes, [](A x, A y) { return x + y; });
    }
    const A s = lanes[0];
    const A inverse = A(1) / all.sum;
    if (S == Score::kSoftmax && !p.renormalize)
      for (int64_t e = 0; e < p.num_experts; ++e)
        out[e] = from_acc<T>(scale * (share<S>(row.logits[e], all.top) * inverse * -s));
    else
      for (int64_t e = 0; e < p.num_experts; ++e) out[e] = from_acc<T>(A(0));
    for (int64_t k = 0; k < p.top_k; ++k) {
      const A z = row.selected[k];
      A v = normalized ? share<S>(z, all.top) / all.sum : lone_score<S>(z);
      if (S == Score::kNone) v = normalized ? A(1) / all.sum : A(1);
      if (S != Score::kSoftmax) v *= log_slope<S>(z);
      out[ids[k]] = from_acc<T>(scale * (v * (grad[k] - s)));
    }
  }
  return -1;
}

// The backward pass for K <= 16 and float32 arithmetic, a tile of rows at once.
template <typename T, Score S>
int64_t backward_tiles(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  const int64_t n = p.num_experts, width = padded(n);
  const int top_k = static_cast<int>(p.top_k);
  float* widened = reinterpret_cast<float*>(room);  // where all are needed
  float* shares = widened + kTile * width;
  const float scale = static_cast<float>(p.scale);
  const bool normalized = S == Score::kSoftmax || p.renormalize;
  const bool dense = S == Score::kSoftmax && !p.renormalize;
  for (int r = 0; r < kTile; ++r)
    for (int64_t e = n; e < width; ++e) widened[r * width + e] = minus_infinity<float>();
  for (int64_t t = begin; t < end; t += kTile) {
    const int count = static_cast<int>(end - t < kTile ? end - t : kTile);
    const int32_t* ids = p.ids + t * top_k;
    const float* grad = static_cast<const float*>(p.grad) + t * top_k;
    const T* rows = static_cast<const T*>(p.logits) + t * n;
    T* out = static_cast<T*>(p.grad_logits) + t * n;
    for (int64_t i = 0; i < int64_t{count} * top_k; ++i)
      if (ids[i] < 0 || ids[i] >= n) return t * top_k + i;
    Tile z = {}, g = {}, v, products;
    for (int r = 0; r < count; ++r)
      for (int k = 0; k < top_k; ++k) {
        z[k][r] = to_acc(rows[r * n + ids[r * top_k + k]]);
        g[k][r] = grad[r * top_k + k];
      }
    float top[kTile] = {}, sum[kTile], s[kTile] = {};
    for (int r = 0; r < kTile; ++r) sum[r] = 1;
    if (dense) {
      const float* logits = logits_of_tile(rows, count, n, width, widened);
      normalize_rows(logits, count, width, shares, top, sum);
    }
    if (p.renormalize) {
      normalize_tile<S>(z, top_k, v, top, sum);
    } else {
      for (int k = 0; k < top_k; ++k)
        for (int r = 0; r < kTile; ++r)
          v[k][r] = normalized ? share<S>(z[k][r], top[r]) : lone_score<S>(z[k][r]);
    }
    if (normalized) {
      for (int k = 0; k < top_k; ++k)
        for (int r = 0; r < kTile; ++r) {
          v[k][r] /= sum[r];
          products[k][r] = v[k][r] * g[k][r];
        }
      for (int k = top_k; k < kColumns; ++k)
        for (int r = 0; r < kTile; ++r) products[k][r] = 0;
      fold_tile(products, [](float x, float y) { return x + y; });
      for (int r = 0; r < kTile; ++r) s[r] = products[0][r];
    }
    for (int k = 0; k < top_k; ++k)
      for (int r = 0; r < kTile; ++r) {
        float x = v[k][r];
        if constexpr (S == Score::kNone) x = normalized ? 1.f / sum[r] : 1.f;
        if constexpr (S != Score::kSoftmax) x *= log_slope<S>(z[k][r]);
        v[k][r] = scale * (x * (g[k][r] - s[r]));
      }
    for (int r = 0; r < count; ++r) {
      T* row = out + r * n;
      if (dense) {
        const float* share = shares + r * width;
        const float inverse = 1.f / sum[r], minus = -s[r];
        for (int64_t e = 0; e < n; ++e) row[e] = from_acc<T>(scale * (share[e] * inverse * minus));
      } else {
        memset(row, 0, static_cast<size_t>(n) * sizeof(T));  // +0 in every type
      }
      for (int k = 0; k < top_k; ++k) row[ids[r * top_k + k]] = from_acc<T>(v[k][r]);
    }
  }
  return -1;
}

}  // namespace

void forward(const Params& p, int64_t begin, int64_t end, double* room) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    dispatch_score(p.score, [&]<Score S>() {
      if constexpr (sizeof(acc_t<T>) == sizeof(float))
        if (p.top_k <= kColumns) return forward_tiles<T, S>(p, begin, end, room);
      forward_rows<T, S>(p, begin, end, room);
    });
  });
}

int64_t backward(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  int64_t bad = -1;
  dispatch_floating(p.dtype, [&]<typename T>() {
    dispatch_score(p.score, [&]<Score S>() {
      if constexpr (sizeof(acc_t<T>) == sizeof(float))
        if (p.top_k <= kColumns) {
          bad = backward_tiles<T, S>(p, begin, end, room);
          return;
        }
      bad = backward_rows<T, S>(p, begin, end, room);
    });
  });
  return bad;
}

}  // namespace mergeme::topk_gating::MERGEME_ISA
