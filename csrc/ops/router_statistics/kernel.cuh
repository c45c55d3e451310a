#pragma once
#include "csrc/common/elementary.h"
#include "csrc/ops/router_statistics/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::router_statistics {

template <typename A>
struct Softmax {
  A top;      // the largest logit; 0 if all are -inf
  A lse;      // log(sum_e exp(logits_e))
  A inverse;  // 1 / sum_e exp(logits_e - top)
};

// Of a row of n logits, expert e in lane e % 32.
template <typename T, typename A = acc_t<T>>
__device__ Softmax<A> softmax(const T* logits, int64_t n) {
  const int64_t lane = simt::lane_id();
  A largest = minus_infinity<A>();
  for (int64_t e = lane; e < n; e += kLanes) {
    const A z = to_acc(logits[e]);
    largest = z > largest ? z : largest;
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(simt::kFullWarp, largest, step);
    largest = other > largest ? other : largest;
  }
  const A top = largest == minus_infinity<A>() ? A(0) : largest;
  A sum = 0;
  for (int64_t e = lane; e < n; e += kLanes) sum += exp_nonpositive(to_acc(logits[e]) - top);
  for (int step = kLanes / 2; step > 0; step /= 2)
    sum += __shfl_xor_sync(simt::kFullWarp, sum, step);
  const A usable = sum == A(0) ? A(1) : sum;
  return {top, largest + log_positive(usable), A(1) / usable};
}

// partials[c][e] = sum over the tokens of chunk c that count of softmax(logits)_e, and behind them
// the sum of lse^2; counts[e] += ids equal to e. One warp owns a chunk, a lane its experts' sums;
// in shared memory, or in the chunk's row of partials for more experts than fit there. Counts are
// integers, so the order of the atomics does not matter.
template <typename T, bool kShared>
__global__ void sum_kernel(Params p) {
  simt::begin_overlapped();
  using A = acc_t<T>;
  const int64_t lane = threadIdx.x, n = p.num_experts;
  A* row = static_cast<A*>(p.partials) + blockIdx.x * (n + 1);
  A* sums = kShared ? simt::dynamic_shared<A>() : row;
  int32_t* counts = kShared ? reinterpret_cast<int32_t*>(simt::dynamic_shared<A>() + n) : p.counts;
  for (int64_t e = lane; e < n; e += kLanes) {
    sums[e] = 0;
    if (kShared) counts[e] = 0;
  }
  if constexpr (kShared) __syncwarp();  // for the counts: a lane adds to its own sums only
  const int64_t begin = blockIdx.x * p.chunk;
  const int64_t end = begin + p.chunk < p.num_tokens ? begin + p.chunk : p.num_tokens;
  A squares = 0;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t k = lane; k < p.top_k; k += kLanes) {
      const int32_t id = p.ids[t * p.top_k + k];
      MERGEME_DEVICE_ASSERT(id >= 0 && id < n);
      if (p.mask == nullptr || p.mask[t]) atomicAdd(counts + id, 1);
    }
    if (p.mask != nullptr && !p.mask[t]) continue;  // all lanes alike
    const T* logits = static_cast<const T*>(p.logits) + t * n;
    const Softmax<A> all = softmax(logits, n);
    for (int64_t e = lane; e < n; e += kLanes)
      sums[e] += exp_nonpositive(to_acc(logits[e]) - all.top) * all.inverse;
    squares += all.lse * all.lse;
  }
  if (lane == 0) row[n] = squares;
  if constexpr (kShared) {
    __syncwarp();
    for (int64_t e = lane; e < n; e += kLanes) {
      row[e] = sums[e];
      if (counts[e] != 0) atomicAdd(p.counts + e, counts[e]);
    }
  }
}

// sums[e] and squares = the partials' sums in chunk order; one thread owns a column.
template <typename A>
__global__ void finish_kernel(Params p) {
  simt::begin_overlapped();
  const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, n = p.num_experts;
  if (column > n) return;
  const A* from = static_cast<const A*>(p.partials) + column;
  A sum = 0;
  for (int64_t c = 0; c < p.num_chunks; ++c) sum += from[c * (n + 1)];
  *(column < n ? static_cast<A*>(p.sums) + column : static_cast<A*>(p.squares)) = sum;
}

// With p = softmax(logits), g the gradient of the sums and q that of the squares:
// grad_logits_j = p_j (g_j - sum_e p_e g_e + 2 q lse), or 0 where the token does not count. One
// warp owns a token.
template <typename T>
__global__ void backward_kernel(BackwardParams p) {
  simt::begin_overlapped();
  using A = acc_t<T>;
  const int64_t lane = simt::lane_id(), n = p.num_experts;
  const int64_t warps_per_block = blockDim.x / simt::kWarpSize;
  const int64_t step = gridDim.x * warps_per_block;
  const A* grad = static_cast<const A*>(p.grad_sums);
  const A grad_square = *static_cast<const A*>(p.grad_squares);
  for (int64_t t = blockIdx.x * warps_per_block + simt::warp_id(); t < p.num_tokens; t += step) {
    const T* logits = static_cast<const T*>(p.logits) + t * n;
    T* out = static_cast<T*>(p.grad_logits) + t * n;
    if (p.mask != nullptr && !p.mask[t]) {
      for (int64_t e = lane; e < n; e += kLanes) out[e] = from_acc<T>(A(0));
      continue;
    }
    const Softmax<A> all = softmax(logits, n);
    const auto probability = [&](int64_t e) {
      return exp_nonpositive(to_acc(logits[e]) - all.top) * all.inverse;
    };
    A dot = 0;
    for (int64_t e = lane; e < n; e += kLanes) dot += probability(e) * grad[e];
    for (int half = kLanes / 2; half > 0; half /= 2)
      dot += __shfl_xor_sync(simt::kFullWarp, dot, half);
    const A of_lse = grad_square == A(0) ? A(0) : A(2) * grad_square * all.lse;
    const A common = of_lse - dot;
    for (int64_t e = lane; e < n; e += kLanes)
      out[e] = from_acc<T>(probability(e) * (grad[e] + common));
  }
}

}  // namespace mergeme::router_statistics
