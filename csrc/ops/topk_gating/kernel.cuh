#pragma once
#include "csrc/common/kth_largest.cuh"
#include "csrc/ops/topk_gating/params.h"
#include "csrc/ops/topk_gating/scores.h"
#include "csrc/simt/device.cuh"

namespace mergeme::topk_gating {

__device__ __forceinline__ int32_t warp_max(int32_t x) {
  return __reduce_max_sync(simt::kFullWarp, x);
}
// Exact, so the order of the folding does not matter; NaN is never larger.
template <typename T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(simt::kFullWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}
// Halves onto halves: every lane adds the same pairs, so all hold the same bits.
template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(simt::kFullWarp, x, step);
  return x;
}

// The formulas of scores.h for a score known at run time: a warp branches as one, and kernels need
// not be compiled for each score.
template <typename A>
__device__ __forceinline__ A level(Score score, A z) {
  if (score == Score::kSoftmax) return level<Score::kSoftmax>(z);
  if (score == Score::kSigmoid) return level<Score::kSigmoid>(z);
  if (score == Score::kSqrtSoftplus) return level<Score::kSqrtSoftplus>(z);
  return level<Score::kNone>(z);
}
template <typename A>
__device__ __forceinline__ A share(Score score, A z, A top) {
  if (score == Score::kSoftmax) return share<Score::kSoftmax>(z, top);
  if (score == Score::kSigmoid) return share<Score::kSigmoid>(z, top);
  if (score == Score::kSqrtSoftplus) return share<Score::kSqrtSoftplus>(z, top);
  return share<Score::kNone>(z, top);
}
template <typename A>
__device__ __forceinline__ A lone_score(Score score, A z) {
  if (score == Score::kSigmoid) return lone_score<Score::kSigmoid>(z);
  if (score == Score::kSqrtSoftplus) return lone_score<Score::kSqrtSoftplus>(z);
  return z;
}
template <typename A>
__device__ __forceinline__ A choice_score(Score score, A z) {
  if (score == Score::kSqrtSoftplus) return choice_score<Score::kSqrtSoftplus>(z);
  return lone_score(score, z);
}
template <typename A>
__device__ __forceinline__ A log_slope(Score score, A z) {
  if (score == Score::kSigmoid) return log_slope<Score::kSigmoid>(z);
  if (score == Score::kSqrtSoftplus) return log_slope<Score::kSqrtSoftplus>(z);
  return A(1);
}
template <typename A>
__device__ __forceinline__ A usable_sum(Score score, A top, A sum) {
  return score == Score::kNone ? usable_sum<Score::kNone>(top, sum)
                               : usable_sum<Score::kSoftmax>(top, sum);
}
template <typename A>
__device__ __forceinline__ key_t<A> top2_key(Score score, key_t<A> first, key_t<A> second,
                                             bool biased, A top) {
  if (score == Score::kSigmoid) return top2_key<Score::kSigmoid>(first, second, biased, top);
  if (score == Score::kSqrtSoftplus)
    return top2_key<Score::kSqrtSoftplus>(first, second, biased, top);
  if (score == Score::kNone) return top2_key<Score::kNone>(first, second, biased, top);
  return top2_key<Score::kSoftmax>(first, second, biased, top);
}

template <typename A>
struct Normalizer {
  A top;  // the largest level
  A sum;  // of the shares
};

// Over items 0 to n - 1 of a row, item i in lane i % 32; z_at(i) is called by that lane only.
template <typename A, typename At>
__device__ Normalizer<A> normalizer(Score score, int64_t n, At z_at) {
  const int64_t lane = simt::lane_id();
  A top = minus_infinity<A>();
  for (int64_t i = lane; i < n; i += kLanes) {
    const A x = level(score, z_at(i));
    top = x > top ? x : top;
  }
  top = finite_top(warp_max(top));
  A sum = 0;
  for (int64_t i = lane; i < n; i += kLanes) sum += share(score, z_at(i), top);
  return {top, usable_sum(score, top, warp_sum(sum))};
}

// The largest and the second largest of the lanes' two.
template <typename Key>
__device__ __forceinline__ void warp_top2(Key& first, Key& second) {
  for (int step = 16; step > 0; step /= 2) {
    const Key a = __shfl_xor_sync(simt::kFullWarp, first, step);
    const Key b = __shfl_xor_sync(simt::kFullWarp, second, step);
    const Key lower = a < first ? a : first, higher = b > second ? b : second;
    first = a > first ? a : first;
    second = lower > higher ? lower : higher;
  }
}

// Makes groups[g] kTakenKey for the top groups of a token and leaves another key for the others.
// One warp; key_at(e) is called by lane e % 32 only.
template <typename A, typename At>
__device__ void choose_groups(const Params& p, A top, key_t<A>* groups, At key_at) {
  using Key = key_t<A>;
  const int32_t lane = static_cast<int32_t>(simt::lane_id());
  const int32_t num_groups = static_cast<int32_t>(p.num_groups);
  const int64_t size = p.num_experts / p.num_groups;
  for (int32_t g = 0; g < num_groups; ++g) {
    Key first = kTakenKey<A>, second = kTakenKey<A>;
    const int64_t begin = g * size, end = begin + size;
    const int64_t skip = (lane - begin % kLanes + kLanes) % kLanes;
    for (int64_t e = begin + skip; e < end; e += kLanes) {
      const Key key = key_at(e), lower = key < first ? key : first;
      first = key > first ? key : first;
      second = lower > second ? lower : second;
    }
    if (p.group_score == GroupScore::kTop2) {
      warp_top2(first, second);
      first = top2_key<A>(p.score, first, second, p.bias != nullptr, top);
    } else {
      first = warp_max(first);
    }
    if (lane == g % kLanes) groups[g] = first;
  }
  for (int64_t i = 0; i < p.top_groups; ++i) {  // a lane reads and writes its own groups only
    Key best = kTakenKey<A>;
    int32_t group = std::numeric_limits<int32_t>::max();
    for (int32_t g = lane; g < num_groups; g += kLanes)
      if (groups[g] > best) {
        best = groups[g];
        group = g;
      }
    group = __reduce_min_sync(simt::kFullWarp,
                              best == warp_max(best) ? group : std::numeric_limits<int32_t>::max());
    if (lane == group % kLanes) groups[group] = kTakenKey<A>;
  }
  __syncwarp();
}

// One key for each lane of a segment of kWidth lanes, a power of two; all lanes of the warp call.
template <int kWidth, typename T>
__device__ __forceinline__ T segment_max(T x) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(simt::kFullWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}
// Over the segment's active lanes; adds the same pairs as normalizer() does.
template <int kWidth, typename A>
__device__ __forceinline__ Normalizer<A> segment_normalizer(Score score, A z, bool active) {
  const A top = finite_top(segment_max<kWidth>(active ? level(score, z) : minus_infinity<A>()));
  A sum = active ? share(score, z, top) : A(0);
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2)
    sum += __shfl_xor_sync(simt::kFullWarp, sum, step);
  return {top, usable_sum(score, top, sum)};
}

// What topk_kernel does, for at most kWidth experts without groups: a segment of kWidth lanes owns
// a token, a lane an expert and later a slot.
template <typename T, int kWidth>
__global__ void topk_segment_kernel(Params p) {
  simt::begin_overlapped();
  using A = acc_t<T>;
  using Key = key_t<A>;
  constexpr int kTokens = 32 / kWidth;  // of a warp
  const int lane = static_cast<int>(simt::lane_id()) % kWidth;
  const unsigned start = simt::lane_id() - lane;
  const int64_t warps_per_block = blockDim.x / simt::kWarpSize;
  const int64_t step = gridDim.x * warps_per_block * kTokens;
  const A scale = static_cast<A>(p.scale);
  const Score score = p.score;
  const bool softmax = score == Score::kSoftmax, is_expert = lane < p.num_experts;
  int64_t first = (blockIdx.x * warps_per_block + simt::warp_id()) * kTokens;
  for (; first < p.num_tokens; first += step) {  // a warp goes round together
    const int64_t t = first + start / kWidth;
    const bool is_token = t < p.num_tokens;
    const T* logits = static_cast<const T*>(p.logits) + (is_token ? t : first) * p.num_experts;
    const A z = is_expert ? to_acc(logits[lane]) : minus_infinity<A>();
    Normalizer<A> all{A(0), A(1)};
    if (softmax && needs_all(p)) all = segment_normalizer<kWidth>(score, z, is_expert);
    A x = z;
    if (p.bias != nullptr && is_expert)
      x = (softmax ? share(score, z, all.top) * (A(1) / all.sum) : choice_score(score, z)) +
          A(p.bias[lane]);
    Key key = is_expert ? order_key(x) : kTakenKey<A>;
    A mine = 0;
    int32_t id = 0;
    bool has_nan = false;
    for (int k = 0; k < p.top_k; ++k) {
      const Key best = segment_max<kWidth>(key);
      const unsigned holders = __ballot_sync(simt::kFullWarp, key == best) >> start;
      const int taken = __ffs(holders) - 1;  // the segment's own lanes come first and have one
      const A picked = __shfl_sync(simt::kFullWarp, z, taken, kWidth);
      if (lane == taken) key = kTakenKey<A>;
      if (lane == k) {
        id = taken;
        mine = picked;
      }
      has_nan = has_nan || best == kNanKey<A>;
    }
    if (p.renormalize) all = segment_normalizer<kWidth>(score, mine, lane < p.top_k);
    if (is_token && lane < p.top_k) {
      const A w = softmax || p.renormalize ? share(score, mine, all.top) / all.sum
                                           : lone_score(score, mine);
      p.ids[t * p.top_k + lane] = id;
      static_cast<A*>(p.weights)[t * p.top_k + lane] =
          has_nan ? std::numeric_limits<A>::quiet_NaN() : w * scale;
    }
  }
}

inline constexpr int64_t kMaxRounds = 16;  // a slot more than this is cheaper to rank than to find

// ids[t] = the top_k experts of token t by score(logits[t]) + bias, weights[t] = their scores,
// normalised and scaled. One warp owns a token: lane l holds the keys of experts l, l + 32, ... in
// registers, or with kPerLane = 0 makes them again each time.
//
// Up to kMaxRounds slots: each of top_k rounds takes the largest key left, of equal ones the lowest
// expert; with kPerLane = 0 of those that come after the last one taken. More slots: the key of
// rank top_k splits the experts; those above it and the first that equal it are put, in the order
// of their ids, where the weights go later, and each counts those before it.
//
// The lane that writes slot k is the one that reads it back, but for the ranked ids.
template <typename T, int kPerLane>
__global__ void topk_kernel(Params p) {
  simt::begin_overlapped();
  using A = acc_t<T>;
  using Key = key_t<A>;
  const int64_t lane = simt::lane_id();
  const int64_t warps_per_block = blockDim.x / simt::kWarpSize;
  const int64_t step = gridDim.x * warps_per_block;
  const A scale = static_cast<A>(p.scale);
  const Score score = p.score;
  const bool softmax = score == Score::kSoftmax;
  Key* groups = simt::dynamic_shared<Key>() + simt::warp_id() * p.num_groups;
  for (int64_t t = blockIdx.x * warps_per_block + simt::warp_id(); t < p.num_tokens; t += step) {
    const T* logits = static_cast<const T*>(p.logits) + t * p.num_experts;
    int32_t* ids = p.ids + t * p.top_k;
    A* weights = static_cast<A*>(p.weights) + t * p.top_k;
    const auto logit = [&](int64_t e) { return to_acc(logits[e]); };
    Normalizer<A> all{A(0), A(1)};
    if (softmax && needs_all(p)) all = normalizer<A>(score, p.num_experts, logit);
    const A inverse = A(1) / all.sum;
    // Without a bias the logits' order is the scores', without the ties that rounding makes.
    const auto key_at = [&](int64_t e) {
      A x = logit(e);
      if (p.bias != nullptr)
        x = (softmax ? share(score, x, all.top) * inverse : choice_score(score, x)) + A(p.bias[e]);
      return order_key(x);
    };
    const int64_t group_size = p.num_experts / p.num_groups;
    if (p.num_groups > 1) choose_groups<A>(p, all.top, groups, key_at);
    const auto is_open = [&](int64_t e) {
      return p.num_groups == 1 || groups[e / group_size] == kTakenKey<A>;
    };

    [[maybe_unused]] Key keys[kPerLane > 0 ? kPerLane : 1];
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const int64_t e = lane + r * kLanes;
      keys[r] = e < p.num_experts && is_open(e) ? key_at(e) : kTakenKey<A>;
    }
    bool has_nan = false;
    if (p.top_k <= kMaxRounds) {
      Key last = kNanKey<A>;
      int32_t taken = -1;
      for (int64_t k = 0; k < p.top_k; ++k) {
        Key best = kTakenKey<A>;
        int32_t expert = std::numeric_limits<int32_t>::max();
        if constexpr (kPerLane > 0) {
#pragma unroll
          for (int r = 0; r < kPerLane; ++r)
            if (keys[r] > best) {
              best = keys[r];
              expert = static_cast<int32_t>(lane) + r * kLanes;
            }
        } else {
          for (int64_t e = lane; e < p.num_experts; e += kLanes) {
            const Key key = key_at(e);
            if (key > best && (key < last || (key == last && e > taken)) && is_open(e)) {
              best = key;
              expert = static_cast<int32_t>(e);
            }
          }
        }
        last = warp_max(best);
        taken = __reduce_min_sync(simt::kFullWarp,
                                  best == last ? expert : std::numeric_limits<int32_t>::max());
#pragma unroll
        for (int r = 0; r < kPerLane; ++r)
          if (lane + r * kLanes == taken) keys[r] = kTakenKey<A>;
        if (lane == k % kLanes) ids[k] = taken;
        has_nan = has_nan || last == kNanKey<A>;
      }
    } else {
      const auto count_from = [&](Key least) {
        int32_t count = 0;
        if constexpr (kPerLane > 0) {
#pragma unroll
          for (int r = 0; r < kPerLane; ++r) count += keys[r] >= least;
        } else {
          for (int64_t e = lane; e < p.num_experts; e += kLanes)
            count += is_open(e) && key_at(e) >= least;
        }
        return int64_t{__reduce_add_sync(simt::kFullWarp, count)};
      };
      const Key last = kth_largest<Key>(p.top_k, count_from);
      const int64_t above = last == kNanKey<A> ? 0 : count_from(last + 1);
      has_nan = count_from(kNanKey<A>) > 0;
      int32_t* unsorted = reinterpret_cast<int32_t*>(weights);
      int64_t kept = 0, equal_left = p.top_k - above;
      const unsigned below = (1u << lane) - 1;
      const auto keep = [&](int64_t e, Key key) {
        const unsigned equals = __ballot_sync(simt::kFullWarp, key == last);
        const bool stays = key > last || (key == last && __popc(equals & below) < equal_left);
        const unsigned staying = __ballot_sync(simt::kFullWarp, stays);
        if (stays) unsorted[kept + __popc(staying & below)] = static_cast<int32_t>(e);
        kept += __popc(staying);
        equal_left -= __popc(equals);
      };
      if constexpr (kPerLane > 0) {
#pragma unroll
        for (int r = 0; r < kPerLane; ++r) keep(lane + r * kLanes, keys[r]);
      } else {
        for (int64_t first = 0; first < p.num_experts; first += kLanes) {
          const int64_t e = first + lane;
          keep(e, e < p.num_experts && is_open(e) ? key_at(e) : kTakenKey<A>);
        }
      }
      __syncwarp();
      for (int64_t i = lane; i < p.top_k; i += kLanes) {
        const Key key = key_at(unsorted[i]);
        int64_t rank = 0;
        for (int64_t j = 0; j < p.top_k; ++j) {
          const Key other = key_at(unsorted[j]);
          rank += other > key || (other == key && j < i);
        }
        ids[rank] = unsorted[i];
      }
      __syncwarp();
    }
    __syncwarp();  // the groups' keys are read before the next token's are written

    const auto selected = [&](int64_t k) { return to_acc(logits[ids[k]]); };
    if (p.renormalize) all = normalizer<A>(score, p.top_k, selected);
    for (int64_t k = lane; k < p.top_k; k += kLanes) {
      const A z = selected(k);
      const A w =
          softmax || p.renormalize ? share(score, z, all.top) / all.sum : lone_score(score, z);
      weights[k] = has_nan ? std::numeric_limits<A>::quiet_NaN() : w * scale;
    }
  }
}

// grad_logits from grad, the gradient of the weights w = scale * v, with s = sum_i v_i grad_i over
// the selected experts and r_j = d log(score_j) / d logit_j:
//   softmax                       scale * p_j (grad_j - s) where selected, -scale * p_j s elsewhere
//   softmax, renormalised         scale * v_j (grad_j - s) where selected, 0 elsewhere
//   another score, renormalised   scale * v_j r_j (grad_j - s) where selected, 0 elsewhere
//   another score                 scale * v_j r_j grad_j where selected, 0 elsewhere
// One warp owns a token. It fills the row, waits, then writes the selected: ids are distinct, so
// lanes write apart.
template <typename T>
__global__ void backward_kernel(BackwardParams p) {
  simt::begin_overlapped();
  using A = acc_t<T>;
  const int64_t lane = simt::lane_id();
  const int64_t warps_per_block = blockDim.x / simt::kWarpSize;
  const int64_t step = gridDim.x * warps_per_block;
  const A scale = static_cast<A>(p.scale);
  const Score score = p.score;
  const bool normalized = score == Score::kSoftmax || p.renormalize;
  for (int64_t t = blockIdx.x * warps_per_block + simt::warp_id(); t < p.num_tokens; t += step) {
    const T* logits = static_cast<const T*>(p.logits) + t * p.num_experts;
    T* out = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    const int32_t* ids = p.ids + t * p.top_k;
    const A* grad = static_cast<const A*>(p.grad) + t * p.top_k;
    const auto selected = [&](int64_t k) {
      MERGEME_DEVICE_ASSERT(ids[k] >= 0 && ids[k] < p.num_experts);
      return to_acc(logits[ids[k]]);
    };
    Normalizer<A> all{A(0), A(1)};
    A s = 0;
    if (normalized) {
      if (p.renormalize)
        all = normalizer<A>(score, p.top_k, selected);
      else
        all = normalizer<A>(score, p.num_experts, [&](int64_t e) { return to_acc(logits[e]); });
      for (int64_t k = lane; k < p.top_k; k += kLanes)
        s += share(score, selected(k), all.top) / all.sum * grad[k];
      s = warp_sum(s);
    }
    const A inverse = A(1) / all.sum;
    for (int64_t e = lane; e < p.num_experts; e += kLanes) {
      A x = 0;
      if (score == Score::kSoftmax && !p.renormalize)
        x = scale * (share(score, to_acc(logits[e]), all.top) * inverse * -s);
      out[e] = from_acc<T>(x);
    }
    __syncwarp();
    for (int64_t k = lane; k < p.top_k; k += kLanes) {
      const A z = selected(k);
      A v = normalized ? share(score, z, all.top) / all.sum : lone_score(score, z);
      if (score == Score::kNone) v = normalized ? A(1) / all.sum : A(1);
      if (score != Score::kSoftmax) v *= log_slope(score, z);
      out[ids[k]] = from_acc<T>(scale * (v * (grad[k] - s)));
    }
  }
}

}  // namespace mergeme::topk_gating
