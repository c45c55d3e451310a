#pragma once
#include "csrc/common/runs.cuh"
#include "csrc/ops/merge_task_vectors/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::merge_task_vectors {

// terms[m] = everything the merge needs to know of model m, and the sum of all weights in index
// order. One thread per model, grid-stride; thread 0 of the grid also sums.
template <typename Acc>
__global__ void prepare_kernel(Params p) {
  auto* terms = static_cast<Term<Acc>*>(p.terms);
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t m = first; m < p.num_models; m += int64_t{gridDim.x} * blockDim.x) {
    const double* row = p.selection + m * selection_width(p.mask);
    if (p.mask == Mask::kRandom) MERGEME_DEVICE_ASSERT(row[0] >= 0 && row[0] <= 1);
    terms[m] = make_term<Acc>(p.tensors[m], p.weights[m], p.scales[m], p.mask, row);
  }
  if (first == 0) {
    double total = 0;
    for (int64_t m = 0; m < p.num_models; ++m) total += p.weights[m];
    *p.total = total;
  }
}

static_assert(kRun == kDecisionsPerGroup);

// out = base + lam * mix, mix the (elected, normalised) sum of coefficient * kept x over the
// models. A thread owns one Philox group: the 8 elements that share a counter, counted in the whole
// tensor, so the first and the last group of a chunk may be partial. Groups are disjoint: no write
// races.
template <typename T, Elect kElect>
__global__ void merge_kernel(Params p) {
  using Acc = acc_t<T>;
  const auto* terms = static_cast<const Term<Acc>*>(p.terms);
  const Acc lam = static_cast<Acc>(p.lam);
  const Acc divisor = p.normalize ? static_cast<Acc>(divisor_of(*p.total)) : Acc(1);
  const int64_t first_group = p.offset / kRun;
  const int64_t groups = ceil_div(p.offset % kRun + p.numel, kRun);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t g = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; g < groups; g += step) {
    const int64_t start = (first_group + g) * kRun - p.offset;
    const Run run(start, p.numel, p.aligned);
    Acc base[kRun] = {}, x[kRun] = {};
    run.load(static_cast<const T*>(p.base), base);
    Acc positive[kRun] = {}, negative[kRun] = {}, agree_positive[kRun] = {},
        agree_negative[kRun] = {}, votes[kRun] = {};
    for (int64_t m = 0; m < p.num_models; ++m) {
      const Term<Acc> term = terms[m];
      run.load(static_cast<const T*>(term.data), x);
      const int ties = term.cut.ties(p.offset + start, kRun);
      const int top_ties = term.top.ties(p.offset + start, kRun);
      PhiloxWords words{};
      if (p.mask == Mask::kRandom)
        words = drop_words(p.key, uint64_t(first_group + g), uint32_t(m));
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const Acc delta = x[e] - base[e];
        bool kept;
        if (p.mask == Mask::kRandom) {
          kept = ((words.w[e / 2] >> (e % 2 * 16)) & 0xffffu) < term.keep_below;
        } else {
          const auto bits = magnitude_bits(delta),
                     low = e < ties ? term.cut.before : term.cut.after;
          kept = p.mask == Mask::kBand
                     ? in_band<Acc>(bits, low, e < top_ties ? term.top.before : term.top.after)
                     : bits >= low;
        }
        const Acc v = kept ? term.coefficient * delta : Acc(0);
        if constexpr (kElect == Elect::kNone) {
          positive[e] += v;
        } else {  // a NaN enters both sums, so that whichever is elected shows it
          positive[e] += v < 0 ? Acc(0) : v;
          negative[e] += v > 0 ? Acc(0) : -v;
          agree_positive[e] += v > 0 ? term.weight : Acc(0);
          agree_negative[e] += v < 0 ? term.weight : Acc(0);
          if constexpr (kElect == Elect::kCount)
            votes[e] += v > 0 ? Acc(1) : v < 0 ? Acc(-1) : Acc(0);
          if constexpr (kElect == Elect::kUnweighted) votes[e] += kept ? delta : Acc(0);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      Acc mix = positive[e], by = divisor;
      if constexpr (kElect != Elect::kNone) {
        const bool minus = kElect == Elect::kSum ? negative[e] > positive[e] : votes[e] < 0;
        if (minus) mix = -negative[e];
        by = minus ? agree_negative[e] : agree_positive[e];
        if (by == 0) by = 1;
      }
      if (p.normalize) mix = mix / by;
      base[e] = base[e] + lam * mix;
    }
    run.store(base, static_cast<T*>(p.out));
  }
}

}  // namespace mergeme::merge_task_vectors
