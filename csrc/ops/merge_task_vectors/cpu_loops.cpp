#include "csrc/ops/merge_task_vectors/cpu_loops.h"

#include "csrc/common/cpu_blocks.h"

namespace mergeme::merge_task_vectors::MERGEME_ISA {
namespace {

using namespace mergeme::blocks;

// Running sums of a block. Without election only `positive` is used, for all values.
template <typename Acc>
struct Sums {
  Acc positive[kBlock], negative[kBlock], agree_positive[kBlock], agree_negative[kBlock],
      votes[kBlock];
};

// Adds coefficient * kept x of one model to the sums; keep(j, x) says whether element j is kept.
template <Elect kElect, typename L, typename Acc, typename Keep>
MERGEME_INLINE void add_model(const L* __restrict tensor, const Acc* __restrict base,
                              const Term<Acc>& term, Sums<Acc>& sums, int n, const Keep& keep) {
  Acc* __restrict positive = sums.positive;
  Acc* __restrict negative = sums.negative;
  Acc* __restrict agree_positive = sums.agree_positive;
  Acc* __restrict agree_negative = sums.agree_negative;
  Acc* __restrict votes = sums.votes;
  const Acc coefficient = term.coefficient, weight = term.weight;
  for (int j = 0; j < n; ++j) {
    const Acc x = to_acc(tensor[j]) - base[j];
    const bool kept = keep(j, x);
    const Acc v = kept ? coefficient * x : Acc(0);
    if constexpr (kElect == Elect::kNone) {
      positive[j] += v;
    } else {  // a NaN enters both sums, so that whichever is elected shows it
      positive[j] += v < 0 ? Acc(0) : v;
      negative[j] += v > 0 ? Acc(0) : -v;
      agree_positive[j] += v > 0 ? weight : Acc(0);
      agree_negative[j] += v < 0 ? weight : Acc(0);
      if constexpr (kElect == Elect::kCount)
        votes[j] += (v > 0 ? Acc(1) : Acc(0)) - (v < 0 ? Acc(1) : Acc(0));
      if constexpr (kElect == Elect::kUnweighted) votes[j] += kept ? x : Acc(0);
    }
  }
}

template <Elect kElect, typename L, typename Acc>
void add_cut(const L* tensor, const Acc* base, const Term<Acc>& term, magnitude_t<Acc> cut,
             Sums<Acc>& sums, int n) {
  add_model<kElect>(tensor, base, term, sums, n,
                    [cut](int, Acc x) { return magnitude_bits(x) >= cut; });
}

template <Elect kElect, typename L, typename Acc>
void add_random(const L* tensor, const Acc* base, const Term<Acc>& term,
                const Random16* __restrict bits, Sums<Acc>& sums, int n) {
  const uint32_t below = term.keep_below;
  add_model<kElect>(tensor, base, term, sums, n,
                    [bits, below](int j, Acc) { return bits[j] < below; });
}

template <Elect kElect, typename L, typename Acc>
void add_band(const L* tensor, const Acc* base, const Term<Acc>& term, int64_t index,
              Sums<Acc>& sums, int n) {
  const Cut<Acc> cut = term.cut, top = term.top;
  const int ties = cut.ties(index, n), top_ties = top.ties(index, n);
  add_model<kElect>(tensor, base, term, sums, n, [=](int j, Acc x) {
    return in_band<Acc>(magnitude_bits(x), j < ties ? cut.before : cut.after,
                        j < top_ties ? top.before : top.after);
  });
}

// mix and the division and base + lam * mix, into `out`.
template <Elect kElect, bool kNormalize, typename Acc>
void finish(const Sums<Acc>& sums, const Acc* __restrict base, Acc lam, Acc divisor,
            Acc* __restrict out, int n) {
  for (int j = 0; j < n; ++j) {
    Acc mix = sums.positive[j], by = divisor;
    if constexpr (kElect != Elect::kNone) {
      const bool minus =
          kElect == Elect::kSum ? sums.negative[j] > sums.positive[j] : sums.votes[j] < 0;
      mix = minus ? -sums.negative[j] : mix;
      by = minus ? sums.agree_negative[j] : sums.agree_positive[j];
      by = by == 0 ? Acc(1) : by;
    }
    if constexpr (kNormalize) mix = mix / by;
    out[j] = base[j] + lam * mix;
  }
}

template <typename T, Elect kElect>
void merge(const Params& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const auto* terms = static_cast<const Term<Acc>*>(p.terms);
  const Acc lam = static_cast<Acc>(p.lam);
  const Acc divisor = static_cast<Acc>(divisor_of(*p.total));
  alignas(64) Acc base[kBlock], out[kBlock];
  alignas(64) Sums<Acc> sums;
  alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
  alignas(64) uint32_t words[kWordsOfBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? int(end - i) : kBlock;
    prefetch(static_cast<const T*>(p.base), i + n, end);
    widen(static_cast<const T*>(p.base) + i, base, n);
    memset(&sums, 0, kElect == Elect::kNone ? sizeof(sums.positive) : sizeof(sums));
    for (int64_t m = 0; m < p.num_models; ++m) {
      const Term<Acc>& term = terms[m];
      const T* from = static_cast<const T*>(term.data);
      prefetch(from, i + n, end);
      const loop_t<T>* tensor = loadable(from + i, widened, n);
      const int64_t index = p.offset + i;
      if (p.mask == Mask::kRandom) {
        add_random<kElect>(tensor, base, term, random_bits(p.key, uint32_t(m), index, n, words),
                           sums, n);
      } else if (p.mask == Mask::kBand) {
        add_band<kElect>(tensor, base, term, index, sums, n);
      } else if (index + n <= term.cut.tie_end || index >= term.cut.tie_end ||
                 term.cut.before == term.cut.after) {
        add_cut<kElect>(tensor, base, term,
                        index < term.cut.tie_end ? term.cut.before : term.cut.after, sums, n);
      } else {  // the tie ends inside this block: at most once per model
        add_model<kElect>(tensor, base, term, sums, n, [&](int j, Acc x) {
          return magnitude_bits(x) >=
                 (index + j < term.cut.tie_end ? term.cut.before : term.cut.after);
        });
      }
    }
    if (p.normalize)
      finish<kElect, true>(sums, base, lam, divisor, out, n);
    else
      finish<kElect, false>(sums, base, lam, divisor, out, n);
    narrow(out, static_cast<T*>(p.out) + i, n);
  }
}

}  // namespace

void merge_range(const Params& p, int64_t begin, int64_t end) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    switch (p.elect) {
      case Elect::kNone:
        return merge<T, Elect::kNone>(p, begin, end);
      case Elect::kSum:
        return merge<T, Elect::kSum>(p, begin, end);
      case Elect::kCount:
        return merge<T, Elect::kCount>(p, begin, end);
      case Elect::kUnweighted:
        return merge<T, Elect::kUnweighted>(p, begin, end);
    }
  });
}

}  // namespace mergeme::merge_task_vectors::MERGEME_ISA
