#include "csrc/ops/topk_gating/cpu_loops.h"

namespace mergeme::topk_gating::MERGEME_ISA {
namespace {

template <typename A>
struct Row {
  A* logits;           // padded with -inf, whose share is 0
  key_t<A>* keys;      // padded with kTakenKey
  A* selected;         // logits of the selected, padded with what adds nothing to a sum
  key_t<A>* best;      // largest key of each block of kLanes
  key_t<A>* groups;    // of a group; kTakenKey if it is among the chosen
  int32_t num_blocks;  // of logits and keys
  bool has_nan;

  Row(double* room, int64_t num_experts, int64_t top_k, A neutral)
      : logits(reinterpret_cast<A*>(room)),
        keys(reinterpret_cast<key_t<A>*>(room + padded(num_experts))),
        selected(reinterpret_cast<A*>(room + 2 * padded(num_experts))),
        best(reinterpret_cast<key_t<A>*>(room + 2 * padded(num_experts) + padded(top_k + 1))),
        groups(best + padded(ceil_div(num_experts, kLanes))),
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

// Over n items padded to whole blocks, in the order that scores.h states.
template <Score S, typename A>
Normalizer<A> normalizer(const A* z, int64_t n) {
  const auto largest = [](A x, A y) { return y > x ? y : x; };
  A lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = level<S>(z[l]);
  for (int l = 0; l < kLanes; ++l) lanes[l] = largest(minus_infinity<A>(), lanes[l]);
  for (int64_t i = kLanes; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = largest(lanes[l], level<S>(z[i + l]));
  const A top = finite_top(fold(lanes, largest));
  for (int l = 0; l < kLanes; ++l) lanes[l] = share<S>(z[l], top);
  for (int64_t i = kLanes; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += share<S>(z[i + l], top);
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

template <Score S, typename A>
void make_keys(const Params& p, const Row<A>& row, const Normalizer<A>& all) {
  const int64_t n = p.num_experts;
  if (p.bias == nullptr)  // the logits' order is the scores', without the ties that rounding makes
    for (int64_t e = 0; e < n; ++e) row.keys[e] = order_key(row.logits[e]);
  else if constexpr (S == Score::kSoftmax)
    for (int64_t e = 0; e < n; ++e)
      row.keys[e] = order_key(share<S>(row.logits[e], all.top) / all.sum + A(p.bias[e]));
  else
    for (int64_t e = 0; e < n; ++e)
      row.keys[e] = order_key(lone_score<S>(row.logits[e]) + A(p.bias[e]));
}

// Marks as taken the experts outside the top groups; of equal groups the lower ones are kept. The
// two best keys of a group give its score, as without a bias logits order like scores.
template <Score S, typename A>
void limit_groups(const Params& p, const Row<A>& row, const Normalizer<A>& all) {
  using Key = key_t<A>;
  const int64_t size = p.num_experts / p.num_groups;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    Key first = kTakenKey<A>, second = kTakenKey<A>;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const Key key = row.keys[e], lower = key < first ? key : first;
      first = key > first ? key : first;
      second = lower > second ? lower : second;
    }
    row.groups[g] = first;
    if (p.group_score == GroupScore::kTop2)
      row.groups[g] = top2_key<S>(first, second, p.bias != nullptr, all.top);
  }
  for (int64_t i = 0; i < p.top_groups; ++i) {
    int64_t best = 0;
    for (int64_t g = 1; g < p.num_groups; ++g)
      if (row.groups[g] > row.groups[best]) best = g;
    row.groups[best] = kTakenKey<A>;
  }
  for (int64_t g = 0; g < p.num_groups; ++g)
    if (row.groups[g] != kTakenKey<A>)
      for (int64_t e = g * size; e < (g + 1) * size; ++e) row.keys[e] = kTakenKey<A>;
}

// Loads a token and makes its keys. Returns the normalizer of the weights, if it is known already.
template <typename T, Score S, typename A>
Normalizer<A> prepare(const Params& p, int64_t t, Row<A>& row) {
  load(static_cast<const T*>(p.logits) + t * p.num_experts, row.logits, p.num_experts);
  Normalizer<A> all{A(0), A(1)};
  if (S == Score::kSoftmax && needs_all(p)) all = normalizer<S>(row.logits, p.num_experts);
  make_keys<S>(p, row, all);
  if (p.num_groups > 1) limit_groups<S>(p, row, all);
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
    return Row<A>(room + r * size, p.num_experts, p.top_k, neutral<S, A>());
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

// The closed forms of kernel.cuh, in the same order of operations.
template <typename T, Score S>
int64_t backward_rows(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  using A = acc_t<T>;
  const Row<A> row(room, p.num_experts, p.top_k, neutral<S, A>());
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

}  // namespace

void forward(const Params& p, int64_t begin, int64_t end, double* room) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    dispatch_score(p.score, [&]<Score S>() { forward_rows<T, S>(p, begin, end, room); });
  });
}

int64_t backward(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  int64_t bad = -1;
  dispatch_floating(p.dtype, [&]<typename T>() {
    dispatch_score(p.score, [&]<Score S>() { bad = backward_rows<T, S>(p, begin, end, room); });
  });
  return bad;
}

}  // namespace mergeme::topk_gating::MERGEME_ISA
