#pragma once
#include "csrc/ops/drop_by_rank/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::drop_by_rank {

inline constexpr int kThreads = 128;
inline constexpr int kDigitBits = 4;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr size_t kSharedBytes = (kBins + 1) * kThreads * sizeof(uint32_t);

// A row's magnitudes and places.
template <typename Bits>
struct Items {
  Bits* bits;
  uint32_t* places;
};

// Moves `from` to `to`, stably sorted by the digit at `shift`. A thread owns a stretch of the row;
// counts[bin, thread], scanned in that order, tell it where its items of each bin go, so no write
// races.
template <typename Bits>
__device__ void sort_pass(const Params& p, Items<Bits> from, Items<Bits> to, int shift,
                          uint32_t* counts) {
  uint32_t* sums = counts + kBins * kThreads;  // [kThreads], of kBins neighbouring counts each
  const int thread = int(threadIdx.x);
  const int64_t own = ceil_div(p.length, kThreads);
  const int64_t begin = thread * own < p.length ? thread * own : p.length;
  const int64_t end = begin + own < p.length ? begin + own : p.length;
  for (int b = 0; b < kBins; ++b) counts[b * kThreads + thread] = 0;
  for (int64_t i = begin; i < end; ++i)
    ++counts[int((from.bits[i] >> shift) & Bits(kBins - 1)) * kThreads + thread];
  __syncthreads();
  uint32_t sum = 0;
  for (int c = thread * kBins; c < (thread + 1) * kBins; ++c) sum += counts[c];
  sums[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    uint32_t before = 0;
    for (int t = 0; t < kThreads; ++t) {
      const uint32_t count = sums[t];
      sums[t] = before;
      before += count;
    }
  }
  __syncthreads();
  uint32_t before = sums[thread];
  for (int c = thread * kBins; c < (thread + 1) * kBins; ++c) {
    const uint32_t count = counts[c];
    counts[c] = before;
    before += count;
  }
  __syncthreads();
  for (int64_t i = begin; i < end; ++i) {
    const Bits bits = from.bits[i];
    const uint32_t place = counts[int((bits >> shift) & Bits(kBins - 1)) * kThreads + thread]++;
    to.bits[place] = bits;
    to.places[place] = from.places[i];
  }
  __syncthreads();  // the lists are complete, and the counts free
}

// out[m, row, i] = x[i], divided by its keep probability if asked, where its random bits are below
// that probability; else 0. The probability follows the rank of |x[i]| in the row. A block owns a
// row of a model at a time, grid-stride; its threads write different elements.
template <typename T>
__global__ void drop_kernel(Params p) {
  using Acc = acc_t<T>;
  using Bits = magnitude_t<Acc>;
  auto* counts = simt::dynamic_shared<uint32_t>();
  auto* bits = static_cast<Bits*>(p.scratch) + blockIdx.x * 2 * p.length;
  auto* places =
      reinterpret_cast<uint32_t*>(static_cast<Bits*>(p.scratch) + gridDim.x * 2 * p.length) +
      blockIdx.x * 2 * p.length;
  Items<Bits> items{bits, places}, other{bits + p.length, places + p.length};
  for (int64_t task = blockIdx.x; task < p.num_models * p.rows; task += gridDim.x) {
    const int64_t m = task / p.rows, start = task % p.rows * p.length;
    const double low = p.selection[2 * m], high = p.selection[2 * m + 1];
    MERGEME_DEVICE_ASSERT(low >= 0 && low <= 1 && high >= 0 && high <= 1);
    const T* base = static_cast<const T*>(p.base) + start;
    const T* tensor = static_cast<const T*>(p.tensors[m]) + start;
    for (int64_t i = threadIdx.x; i < p.length; i += kThreads) {
      const int64_t place = p.length - 1 - i;  // of equal magnitudes the lower index ranks higher
      items.bits[i] = magnitude_bits(to_acc(tensor[place]) - to_acc(base[place]));
      items.places[i] = uint32_t(place);
    }
    __syncthreads();
    for (int shift = 0; shift < Magnitude<Acc>::kBits; shift += kDigitBits) {
      sort_pass(p, items, other, shift, counts);
      const Items<Bits> sorted = other;
      other = items;
      items = sorted;
    }
    const Ramp ramp = make_ramp(low, high, p.length);
    Acc* out = static_cast<Acc*>(p.out) + m * p.rows * p.length + start;
    for (int64_t rank = threadIdx.x; rank < p.length; rank += kThreads) {
      const int64_t i = items.places[rank];
      const double q = ramp.at(rank);
      const auto index = uint64_t(p.offset + start + i);
      const PhiloxWords words = drop_words(p.key, index / kDecisionsPerGroup, uint32_t(m));
      const int e = int(index % kDecisionsPerGroup);
      const uint32_t word =
          e < 4 ? (e < 2 ? words.w[0] : words.w[1]) : (e < 6 ? words.w[2] : words.w[3]);
      const uint32_t random = (word >> (e % 2 * 16)) & 0xffffu;
      const Acc x = to_acc(tensor[i]) - to_acc(base[i]);
      const Acc y = p.inverse_prob ? x / static_cast<Acc>(q) : x;
      out[i] = double(random) < rint(q * 65536) ? y : Acc(0);
    }
    __syncthreads();  // before the next row overwrites the lists
  }
}

}  // namespace mergeme::drop_by_rank
