#include "csrc/ops/router_statistics/cpu_loops.h"

#include "csrc/common/elementary.h"

namespace mergeme::router_statistics::MERGEME_ISA {
namespace {

// lanes[0] = all lanes folded, halves onto halves.
template <typename A, typename F>
inline __attribute__((always_inline)) A fold(A* lanes, F&& combine) {
#pragma GCC unroll 5
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}
template <typename A>
A sum(A* lanes) {
  return fold(lanes, [](A x, A y) { return x + y; });
}

template <typename A>
struct Softmax {
  A lse;      // log(sum_e exp(logits_e)); -inf if all logits are
  A inverse;  // 1 / sum_e shares_e
};

// Widens a row of n logits into z, which is padded with -inf, and writes their shares, exponentials
// relative to the largest.
template <typename T, typename A>
Softmax<A> softmax(const T* logits, int64_t n, A* z, A* shares) {
  for (int64_t e = 0; e < n; ++e) z[e] = to_acc(logits[e]);
  A lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = minus_infinity<A>();
  for (int64_t e = 0; e < n; e += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = z[e + l] > lanes[l] ? z[e + l] : lanes[l];
  const A largest = fold(lanes, [](A x, A y) { return y > x ? y : x; });
  const A top = largest == minus_infinity<A>() ? A(0) : largest;
  for (int l = 0; l < kLanes; ++l) lanes[l] = 0;
  for (int64_t e = 0; e < n; e += kLanes) {
    A block[kLanes];
    for (int l = 0; l < kLanes; ++l) block[l] = exp_nonpositive(z[e + l] - top);
    for (int l = 0; l < kLanes; ++l) lanes[l] += block[l];
    memcpy(shares + e, block, sizeof block);
  }
  const A total = sum(lanes), usable = total == A(0) ? A(1) : total;
  return {largest + log_positive(usable), A(1) / usable};
}

template <typename A>
struct Row {
  A* logits;  // padded with -inf, whose share is 0
  A* shares;

  Row(double* room, int64_t num_experts)
      : logits(reinterpret_cast<A*>(room)),
        shares(reinterpret_cast<A*>(room + padded(num_experts))) {
    for (int64_t e = num_experts; e < padded(num_experts); ++e) logits[e] = minus_infinity<A>();
  }
};

template <typename T>
void sum_rows(const Params& p, int64_t begin, int64_t end, double* room) {
  using A = acc_t<T>;
  const Row<A> row(room, p.num_experts);
  for (int64_t c = begin; c < end; ++c) {
    A* sums = static_cast<A*>(p.partials) + c * (p.num_experts + 1);
    for (int64_t e = 0; e <= p.num_experts; ++e) sums[e] = 0;
    const int64_t last = (c + 1) * p.chunk < p.num_tokens ? (c + 1) * p.chunk : p.num_tokens;
    for (int64_t t = c * p.chunk; t < last; ++t) {
      if (p.mask != nullptr && !p.mask[t]) continue;
      const T* logits = static_cast<const T*>(p.logits) + t * p.num_experts;
      const Softmax<A> all = softmax(logits, p.num_experts, row.logits, row.shares);
      for (int64_t e = 0; e < p.num_experts; ++e) sums[e] += row.shares[e] * all.inverse;
      sums[p.num_experts] += all.lse * all.lse;
    }
  }
}

template <typename T>
void backward_rows(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  using A = acc_t<T>;
  const Row<A> row(room, p.num_experts);
  const A* grad = static_cast<const A*>(p.grad_sums);
  const A grad_square = *static_cast<const A*>(p.grad_squares);
  const int64_t n = p.num_experts;
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(p.grad_logits) + t * n;
    if (p.mask != nullptr && !p.mask[t]) {
      for (int64_t e = 0; e < n; ++e) out[e] = from_acc<T>(A(0));
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + t * n;
    const Softmax<A> all = softmax(logits, n, row.logits, row.shares);
    A lanes[kLanes] = {};
    int64_t e = 0;
    for (; e + kLanes <= n; e += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] += row.shares[e + l] * all.inverse * grad[e + l];
    for (; e < n; ++e) lanes[e % kLanes] += row.shares[e] * all.inverse * grad[e];
    const A of_lse = grad_square == A(0) ? A(0) : A(2) * grad_square * all.lse;
    const A common = of_lse - sum(lanes);
    for (e = 0; e < n; ++e) out[e] = from_acc<T>(row.shares[e] * all.inverse * (grad[e] + common));
  }
}

}  // namespace

void sum_chunks(const Params& p, int64_t begin, int64_t end, double* room) {
  dispatch_floating(p.dtype, [&]<typename T>() { sum_rows<T>(p, begin, end, room); });
}

void backward(const BackwardParams& p, int64_t begin, int64_t end, double* room) {
  dispatch_floating(p.dtype, [&]<typename T>() { backward_rows<T>(p, begin, end, room); });
}

}  // namespace mergeme::router_statistics::MERGEME_ISA
