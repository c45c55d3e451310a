#include "csrc/ops/topk_gating/cpu_loops.h"

namespace mergeme::topk_gating::MERGEME_ISA {
namespace {

template <typename A>
struct Row {
  A* logits;           // padded with -inf, whose share is 0
  key_t<A>* keys;      // padded with kTakenKey
  key_t<A>* best;      // largest key of each block of kLanes
  A* selected;         // logits of the selected, padded with -inf
  int64_t num_blocks;  // of logits and keys

  Row(const Scratch& s, int64_t num_experts)
      : logits(reinterpret_cast<A*>(s.logits)),
        keys(reinterpret_cast<key_t<A>*>(s.keys)),
        best(reinterpret_cast<key_t<A>*>(s.best)),
        selected(reinterpret_cast<A*>(s.selected)),
        num_blocks(ceil_div(num_experts, kLanes)) {}
};

template <typename A>
struct Normalizer {
  A top, sum;
};

// Over n items padded to whole blocks, in the order that scores.h states.
template <Score S, typename A>
Normalizer<A> normalizer(const A* z, int64_t n) {
  A lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = minus_infinity<A>();
  for (int64_t i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const A x = level(S, z[i + l]);
      lanes[l] = x > lanes[l] ? x : lanes[l];
    }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l)
      lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  const A top = finite_top(lanes[0]);
  for (int l = 0; l < kLanes; ++l) lanes[l] = 0;
  for (int64_t i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += share(S, z[i + l], top);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return {top, nonzero_sum(lanes[0])};
}

template <typename T, typename A>
void load(const T* from, A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_acc(from[i]);
  for (int64_t i = n; i % kLanes != 0; ++i) to[i] = minus_infinity<A>();
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

// K rounds: the largest of the blocks' largest keys, its first block, its first place there.
// Returns whether a key was NaN's.
template <typename A>
bool select(const Row<A>& row, int64_t top_k, int32_t* ids) {
  const int32_t num_blocks = static_cast<int32_t>(row.num_blocks);
  for (int32_t b = 0; b < num_blocks; ++b) row.best[b] = block_max(row.keys + b * int64_t{kLanes});
  bool has_nan = false;
  for (int64_t k = 0; k < top_k; ++k) {
    key_t<A> best = row.best[0];
    for (int32_t b = 1; b < num_blocks; ++b) best = row.best[b] > best ? row.best[b] : best;
    const int32_t block = first_equal(row.best, num_blocks, best);
    key_t<A>* keys = row.keys + block * int64_t{kLanes};
    const int32_t place = first_equal(keys, kLanes, best);
    keys[place] = kTakenKey<A>;
    row.best[block] = block_max(keys);
    ids[k] = block * kLanes + place;
    has_nan |= best == kNanKey<A>;
  }
  return has_nan;
}

template <typename A>
void gather_selected(const Row<A>& row, const int32_t* ids, int64_t top_k) {
  for (int64_t k = 0; k < top_k; ++k) row.selected[k] = row.logits[ids[k]];
  for (int64_t k = top_k; k % kLanes != 0; ++k) row.selected[k] = minus_infinity<A>();
}

template <Score S, typename A>
void make_keys(const Params& p, const Row<A>& row, const Normalizer<A>& all) {
  const int64_t n = p.num_experts;
  if (p.bias == nullptr)  // the logits' order is the scores', without the ties that rounding makes
    for (int64_t e = 0; e < n; ++e) row.keys[e] = order_key(row.logits[e]);
  else if constexpr (S == Score::kSoftmax)
    for (int64_t e = 0; e < n; ++e)
      row.keys[e] = order_key(share(S, row.logits[e], all.top) / all.sum + A(p.bias[e]));
  else
    for (int64_t e = 0; e < n; ++e) row.keys[e] = order_key(sigmoid(row.logits[e]) + A(p.bias[e]));
  for (int64_t e = n; e % kLanes != 0; ++e) row.keys[e] = kTakenKey<A>;
}

template <typename T, Score S>
void forward_rows(const Params& p, int64_t begin, int64_t end, const Scratch& scratch) {
  using A = acc_t<T>;
  const Row<A> row(scratch, p.num_experts);
  const A scale = static_cast<A>(p.scale);
  for (int64_t t = begin; t < end; ++t) {
    int32_t* ids = p.ids + t * p.top_k;
    A* weights = static_cast<A*>(p.weights) + t * p.top_k;
    load(static_cast<const T*>(p.logits) + t * p.num_experts, row.logits, p.num_experts);
    Normalizer<A> all{A(0), A(1)};
    if (S == Score::kSoftmax && (p.bias != nullptr || !p.renormalize))
      all = normalizer<S>(row.logits, p.num_experts);
    make_keys<S>(p, row, all);
    const bool has_nan = select(row, p.top_k, ids);
    gather_selected(row, ids, p.top_k);
    if (p.renormalize) all = normalizer<S>(row.selected, p.top_k);
    if (S == Score::kSoftmax || p.renormalize)
      for (int64_t k = 0; k < p.top_k; ++k)
        weights[k] = share(S, row.selected[k], all.top) / all.sum * scale;
    else
      for (int64_t k = 0; k < p.top_k; ++k) weights[k] = sigmoid(row.selected[k]) * scale;
    for (int64_t k = 0; has_nan && k < p.top_k; ++k)
      weights[k] = std::numeric_limits<A>::quiet_NaN();
  }
}

// The closed forms of kernel.cuh, in the same order of operations.
template <typename T, Score S>
int64_t backward_rows(const BackwardParams& p, int64_t begin, int64_t end, const Scratch& scratch) {
  using A = acc_t<T>;
  const Row<A> row(scratch, p.num_experts);
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
        lanes[k % kLanes] += share(S, row.selected[k], all.top) / all.sum * grad[k];
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    const A s = lanes[0];
    if (S == Score::kSoftmax && !p.renormalize)
      for (int64_t e = 0; e < p.num_experts; ++e)
        out[e] = from_acc<T>(scale * (share(S, row.logits[e], all.top) / all.sum * -s));
    else
      for (int64_t e = 0; e < p.num_experts; ++e) out[e] = from_acc<T>(A(0));
    for (int64_t k = 0; k < p.top_k; ++k) {
      const A z = row.selected[k];
      A v = normalized ? share(S, z, all.top) / all.sum : sigmoid(z);
      if (S == Score::kSigmoid) v *= sigmoid_complement(z);
      out[ids[k]] = from_acc<T>(scale * (v * (grad[k] - s)));
    }
  }
  return -1;
}

}  // namespace

void forward(const Params& p, int64_t begin, int64_t end, const Scratch& scratch) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.score == Score::kSoftmax)
      forward_rows<T, Score::kSoftmax>(p, begin, end, scratch);
    else
      forward_rows<T, Score::kSigmoid>(p, begin, end, scratch);
  });
}

int64_t backward(const BackwardParams& p, int64_t begin, int64_t end, const Scratch& scratch) {
  int64_t bad = -1;
  dispatch_floating(p.dtype, [&]<typename T>() {
    bad = p.score == Score::kSoftmax ? backward_rows<T, Score::kSoftmax>(p, begin, end, scratch)
                                     : backward_rows<T, Score::kSigmoid>(p, begin, end, scratch);
  });
  return bad;
}

}  // namespace mergeme::topk_gating::MERGEME_ISA
