#include "csrc/ops/drop_by_rank/cpu_loops.h"

#include "csrc/common/cpu_blocks.h"

namespace mergeme::drop_by_rank::MERGEME_ISA {
namespace {

using namespace mergeme::blocks;

// How a sort cuts magnitude bits into digits. Wide ones need fewer passes, and spread exponents
// over more counters: neighbours that share one wait for each other. Narrow ones have fewer to
// clear.
template <typename Bits, int kDigitBits>
struct Digits {
  static constexpr int kBins = 1 << kDigitBits;
  static constexpr int kCount = (int(sizeof(Bits)) * 8 - 1 + kDigitBits - 1) / kDigitBits;
  uint32_t counts[kCount][kBins] = {};
  static MERGEME_INLINE uint32_t of(Bits bits, int d) {
    return uint32_t(bits >> (d * kDigitBits)) & (kBins - 1);
  }
};
constexpr int64_t kLongRow = 1024;

template <typename Bits>
struct Item {
  Bits bits;
  uint32_t place;
};
static_assert(kScratchPerElement == 2 * sizeof(Item<uint64_t>) + sizeof(uint32_t));

// Appends places with their magnitude bits, in order of falling place, and counts the digits.
template <typename T, typename D>
MERGEME_INLINE void fill(const T* base_row, const T* row, int64_t length,
                         Item<magnitude_t<acc_t<T>>>* items, D& digits) {
  using Acc = acc_t<T>;
  using Bits = magnitude_t<Acc>;
  alignas(64) Acc base[kBlock];
  alignas(64) Bits bits[kBlock];
  alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
  for (int64_t i = 0; i < length; i += kBlock) {
    const int n = length - i < kBlock ? int(length - i) : kBlock;
    widen(base_row + i, base, n);
    const loop_t<T>* __restrict tensor = loadable(row + i, widened, n);
    for (int j = 0; j < n; ++j) bits[j] = magnitude_bits(to_acc(tensor[j]) - base[j]);
    for (int j = 0; j < n; ++j) {
      items[length - 1 - (i + j)] = {bits[j], uint32_t(i + j)};
      for (int d = 0; d < D::kCount; ++d) ++digits.counts[d][D::of(bits[j], d)];
    }
  }
}

// Sorts by magnitude, smallest first, items of equal magnitude staying in order; returns the sorted
// list, which is one of the two. Digits that all items share cost nothing.
template <typename Bits, typename D>
MERGEME_INLINE Item<Bits>* sort_items(Item<Bits>* items, Item<Bits>* other, int64_t length,
                                      D& digits) {
  for (int d = 0; d < D::kCount; ++d) {
    uint32_t* next = digits.counts[d];
    if (next[D::of(items[0].bits, d)] == length) continue;
    uint32_t sum = 0;
    for (int b = 0; b < D::kBins; ++b) {
      const uint32_t count = next[b];
      next[b] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < length; ++i) other[next[D::of(items[i].bits, d)]++] = items[i];
    Item<Bits>* const sorted = other;
    other = items;
    items = sorted;
  }
  return items;
}

template <typename T, int kDigitBits>
void drop_row(const Params& p, int64_t model, int64_t row, void* scratch) {
  using Acc = acc_t<T>;
  using Bits = magnitude_t<Acc>;
  const int64_t start = row * p.length;
  const T* base_row = static_cast<const T*>(p.base) + start;
  const T* tensor_row = static_cast<const T*>(p.tensors[model]) + start;
  Acc* out = static_cast<Acc*>(p.out) + (model * p.rows + row) * p.length;
  auto* items = static_cast<Item<Bits>*>(scratch);
  auto* ranks = reinterpret_cast<uint32_t*>(items + 2 * p.length);
  Digits<Bits, kDigitBits> digits;
  fill(base_row, tensor_row, p.length, items, digits);
  const Item<Bits>* sorted = sort_items(items, items + p.length, p.length, digits);
  for (int64_t r = 0; r < p.length; ++r) ranks[sorted[r].place] = uint32_t(r);

  const Ramp ramp = make_ramp(p.selection[2 * model], p.selection[2 * model + 1], p.length);
  alignas(64) Acc base[kBlock], probabilities[kBlock];
  alignas(64) double below[kBlock];
  alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
  alignas(64) uint32_t words[kWordsOfBlock];
  for (int64_t i = 0; i < p.length; i += kBlock) {
    const int n = p.length - i < kBlock ? int(p.length - i) : kBlock;
    widen(base_row + i, base, n);
    const loop_t<T>* __restrict tensor = loadable(tensor_row + i, widened, n);
    const Random16* __restrict random =
        random_bits(p.key, uint32_t(model), p.offset + start + i, n, words);
    for (int j = 0; j < n; ++j) {
      const double q = ramp.low + ramp.step * double(ranks[i + j]);
      probabilities[j] = p.inverse_prob ? static_cast<Acc>(q) : Acc(1);
      below[j] = rint(q * 65536);
    }
    for (int j = 0; j < n; ++j) {
      const Acc x = (to_acc(tensor[j]) - base[j]) / probabilities[j];
      out[i + j] = double(random[j]) < below[j] ? x : Acc(0);
    }
  }
}

}  // namespace

void drop_rows(const Params& p, int64_t begin, int64_t end, void* scratch) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    for (int64_t t = begin; t < end; ++t) {
      if (p.length < kLongRow)
        drop_row<T, 8>(p, t / p.rows, t % p.rows, scratch);
      else
        drop_row<T, 11>(p, t / p.rows, t % p.rows, scratch);
    }
  });
}

}  // namespace mergeme::drop_by_rank::MERGEME_ISA
