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
  const int64_t size = row_room(p);
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

template <typename T>
MERGEME_INLINE void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) store(to + i, ::mergeme::load(from + i));
  for (; i < n; ++i) to[i] = to_acc(from[i]);
}

// The forward pass for K <= 16 and float32 arithmetic, a tile of rows at once.
template <typename T, Score S>
void forward_tiles(const Params& p, int64_t begin, int64_t end, double* room) {
  const int64_t n = p.num_experts, width = padded(n);
  const int top_k = static_cast<int>(p.top_k);
  float* logits = reinterpret_cast<float*>(room);
  int32_t* keys = reinterpret_cast<int32_t*>(logits + kTile * width);
  float* shares = reinterpret_cast<float*>(keys + kTile * width);
  int32_t* groups = reinterpret_cast<int32_t*>(shares + width);
  const float scale = static_cast<float>(p.scale);
  const bool normalized = S == Score::kSoftmax || p.renormalize;
  for (int64_t e = n; e < width; ++e) {
    for (int r = 0; r < kTile; ++r) {
      logits[r * width + e] = minus_infinity<float>();
      keys[r * width + e] = kTakenKey<float>;
    }
  }
  for (int64_t t = begin; t < end; t += kTile) {
    const int count = static_cast<int>(end - t < kTile ? end - t : kTile);
    float top[kTile] = {}, sum[kTile];
    for (int r = 0; r < kTile; ++r) sum[r] = 1;
    for (int r = 0; r < count; ++r) {
      float* row = logits + r * width;
      widen(static_cast<const T*>(p.logits) + (t + r) * n, row, n);
      if (S == Score::kSoftmax && needs_all(p)) {
        const Normalizer<float> all = normalizer<S>(row, n, shares);
        top[r] = all.top;
        sum[r] = all.sum;
      }
      make_keys<S>(p, row, shares, sum[r], keys + r * width);
      if (p.num_groups > 1) limit_groups<S>(p, top[r], keys + r * width, groups);
    }
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
    if (S == Score::kSoftmax && !p.renormalize)
      for (int64_t e = 0; e < p.num_experts; ++e)
        out[e] = from_acc<T>(scale * (share<S>(row.logits[e], all.top) / all.sum * -s));
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
  float* logits = reinterpret_cast<float*>(room);  // of one row, where all are needed
  float* shares = logits + width;                  // of a tile
  const float scale = static_cast<float>(p.scale);
  const bool normalized = S == Score::kSoftmax || p.renormalize;
  const bool dense = S == Score::kSoftmax && !p.renormalize;
  for (int64_t e = n; e < width; ++e) logits[e] = minus_infinity<float>();
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
    for (int r = 0; dense && r < count; ++r) {
      widen(rows + r * n, logits, n);
      const Normalizer<float> all = normalizer<S>(logits, n, shares + r * width);
      top[r] = all.top;
      sum[r] = all.sum;
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
        for (int64_t e = 0; e < n; ++e) row[e] = from_acc<T>(scale * (share[e] / sum[r] * -s[r]));
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
