#include "csrc/ops/masked_norms/cpu_loops.h"

#include "csrc/common/cpu_blocks.h"

namespace mergeme::masked_norms::MERGEME_ISA {
namespace {

using namespace mergeme::blocks;

static_assert(kSumBlock % kBlock == 0 && kBlock % kLanes == 0);

// Running sums and maxima of the lanes of one block of 4096 elements.
template <typename Bits>
struct Lanes {
  alignas(64) double sums[4][kLanes];  // l1, squares, masked l1, masked squares
  alignas(64) Bits most[2][kLanes];    // magnitude bits
};

// Adds elements 0 to n - 1, lane j % kLanes taking element j.
template <typename Bits>
MERGEME_INLINE void add_rows(const Bits* __restrict bits, const Bits* __restrict kept_bits, int n,
                             Lanes<Bits>& lanes) {
  for (int row = 0; row < n; row += kLanes) {
    const int width = n - row < kLanes ? n - row : kLanes;
    const Bits* __restrict all = bits + row;
    const Bits* __restrict kept = kept_bits + row;
    double* __restrict l1 = lanes.sums[0];
    double* __restrict squares = lanes.sums[1];
    double* __restrict masked_l1 = lanes.sums[2];
    double* __restrict masked_squares = lanes.sums[3];
    Bits* __restrict most = lanes.most[0];
    Bits* __restrict masked_most = lanes.most[1];
    for (int l = 0; l < width; ++l) {
      const double x = magnitude_of(all[l]), masked = magnitude_of(kept[l]);
      l1[l] += x;
      squares[l] += x * x;
      masked_l1[l] += masked;
      masked_squares[l] += masked * masked;
    }
    for (int l = 0; l < width; ++l) {
      most[l] = all[l] > most[l] ? all[l] : most[l];
      masked_most[l] = kept[l] > masked_most[l] ? kept[l] : masked_most[l];
    }
  }
}

template <typename T>
void sum_block(const Params& p, const Term<acc_t<T>>& term, uint32_t model, int64_t first,
               double* partial) {
  using Acc = acc_t<T>;
  using Bits = magnitude_t<Acc>;
  Lanes<Bits> lanes;
  memset(&lanes, 0, sizeof(lanes));
  alignas(64) Acc base[kBlock];
  alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
  alignas(64) Bits bits_buffer[kBlock], kept_buffer[kBlock];  // of a dropped element: zero
  alignas(64) uint32_t words[kWordsOfBlock];
  Bits* __restrict bits = bits_buffer;
  Bits* __restrict kept = kept_buffer;
  const int64_t last = p.numel - first < kSumBlock ? p.numel : first + kSumBlock;
  for (int64_t i = first; i < last; i += kBlock) {
    const int n = last - i < kBlock ? int(last - i) : kBlock;
    const T* from = static_cast<const T*>(term.data);
    prefetch(static_cast<const T*>(p.base), i + n, p.numel);
    prefetch(from, i + n, p.numel);
    widen(static_cast<const T*>(p.base) + i, base, n);
    const loop_t<T>* __restrict tensor = loadable(from + i, widened, n);
    for (int j = 0; j < n; ++j) bits[j] = magnitude_bits(to_acc(tensor[j]) - base[j]);
    if (p.mask == Mask::kRandom) {
      const Random16* __restrict random = random_bits(p.key, model, i, n, words);
      const uint32_t below = term.keep_below;
      for (int j = 0; j < n; ++j) kept[j] = random[j] < below ? bits[j] : 0;
    } else {
      const Cut<Acc> cut = term.cut, top = term.top;
      const int split = cut.ties(i, n), top_split = top.ties(i, n);
      for (int j = 0; j < split; ++j) kept[j] = bits[j] >= cut.before ? bits[j] : 0;
      for (int j = split; j < n; ++j) kept[j] = bits[j] >= cut.after ? bits[j] : 0;
      if (p.mask == Mask::kBand)
        for (int j = 0; j < n; ++j)
          kept[j] = in_band<Acc>(kept[j], 0, j < top_split ? top.before : top.after) ? kept[j] : 0;
    }
    add_rows(bits_buffer, kept_buffer, n, lanes);
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) {
      for (auto& sums : lanes.sums) sums[l] += sums[l + half];
      for (auto& most : lanes.most)
        if (most[l + half] > most[l]) most[l] = most[l + half];
    }
  for (int s = 0; s < 2; ++s) {
    partial[3 * s] = lanes.sums[2 * s][0];
    partial[3 * s + 1] = lanes.sums[2 * s + 1][0];
    partial[3 * s + 2] = magnitude_of(lanes.most[s][0]);
  }
}

}  // namespace

void sum_blocks(const Params& p, int64_t begin, int64_t end) {
  const int64_t blocks = ceil_div(p.numel, kSumBlock);
  dispatch_floating(p.dtype, [&]<typename T>() {
    const auto* terms = static_cast<const Term<acc_t<T>>*>(p.terms);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = 0; m < p.num_models; ++m)
        sum_block<T>(p, terms[m], uint32_t(m), b * kSumBlock,
                     p.partials + (m * blocks + b) * kNorms);
  });
}

}  // namespace mergeme::masked_norms::MERGEME_ISA
