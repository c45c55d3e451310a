#include <algorithm>
#include <mutex>
#include <vector>

#include "csrc/ops/magnitude_threshold/checks.h"
#include "csrc/ops/magnitude_threshold/cpu_loops.h"

namespace mergeme::magnitude_threshold {
namespace {

constexpr int64_t kGrain = 1 << 18;  // elements that repay a thread's histogram of 2^16 bins
constexpr int64_t kStep = 4096;  // elements read for all models before going on: base stays near
constexpr int64_t kTile = 1 << 16;

// The threshold's magnitude bits are found digit by digit, the highest first, from histograms of
// the members: the elements that share the digits found. Once they are few they are collected and
// selected among. All counts are integers, so the number of threads cannot show.
struct Search {
  const void* tensor;
  double* out;   // [2]
  int64_t rank;  // the threshold is the rank-th largest member
  int64_t members;
  uint64_t prefix = 0;  // the digits found
};

class Selector {
 public:
  Selector(const at::Tensor& base, std::vector<Search> searches, int kinds)
      : base_(base.const_data_ptr()),
        dtype_(dtype_of(base)),
        numel_(base.numel()),
        known_(dtype_ == DType::kFloat64 ? Magnitude<double>::kBits : Magnitude<float>::kBits),
        most_(std::max<int64_t>(4096, std::min<int64_t>((1 << 22) / kinds, numel_ / 32))),
        open_(std::move(searches)) {}

  void run() {
    for (;;) {
      collect_small();
      if (open_.empty()) return;
      if (known_ == 0) break;
      find_digit();
    }
    for (const Search& s : open_) locate_tie(s);
  }

 private:
  Stretch stretch(const Search& s, int64_t begin, int64_t end) const {
    return {base_, s.tensor, dtype_, begin, end};
  }

  void finish(const Search& s, uint64_t bits, int64_t tie_end) const {
    const double threshold =
        dtype_ == DType::kFloat64 ? magnitude_of(bits) : double{magnitude_of(uint32_t(bits))};
    if (threshold == threshold) {
      s.out[0] = threshold;
      s.out[1] = static_cast<double>(tie_end);
    }  // else NaNs alone fill the count: they are kept anyway, and the cut stays above infinity
  }

  // Calls step(search number, begin, end) over a thread's elements, all searches of a step in turn.
  template <typename F>
  void sweep(int64_t begin, int64_t end, size_t searches, const F& step) const {
    for (int64_t i = begin; i < end; i += kStep)
      for (size_t s = 0; s < searches; ++s) step(s, i, std::min(i + kStep, end));
  }

  void find_digit() {
    const int digit_bits = std::min(known_, kCpuDigitBits);
    const size_t bins = size_t{1} << digit_bits;
    std::vector<int64_t> total(open_.size() * bins);
    std::mutex mutex;
    at::parallel_for(0, numel_, kGrain, [&](int64_t first, int64_t last) {
      constexpr int64_t kFlush = int64_t{1} << 31;  // the thread's counters have 32 bits
      std::vector<uint32_t> counts(total.size());
      for (int64_t begin = first; begin < last; begin += kFlush) {
        if (begin > first) std::fill(counts.begin(), counts.end(), 0);
        sweep(begin, std::min(begin + kFlush, last), open_.size(),
              [&](size_t s, int64_t from, int64_t to) {
                MERGEME_CALL_LOOPS(count_digits, stretch(open_[s], from, to), known_,
                                   open_[s].prefix, digit_bits, counts.data() + s * bins);
              });
        const std::lock_guard lock(mutex);
        for (size_t b = 0; b < total.size(); ++b) total[b] += counts[b];
      }
    });
    for (size_t s = 0; s < open_.size(); ++s) {
      const int64_t* counts = total.data() + s * bins;
      size_t digit = bins - 1;
      while (counts[digit] < open_[s].rank) open_[s].rank -= counts[digit--];
      open_[s].members = counts[digit];
      open_[s].prefix = open_[s].prefix << digit_bits | digit;
    }
    known_ -= digit_bits;
  }

  // Finishes the searches that have few members left.
  void collect_small() {
    const auto middle = std::partition(open_.begin(), open_.end(),
                                       [&](const Search& s) { return s.members > most_; });
    std::vector<Search> small(middle, open_.end());
    open_.erase(middle, open_.end());
    if (small.empty()) return;
    std::vector<std::vector<Member>> members(small.size());
    std::mutex mutex;
    at::parallel_for(0, numel_, kGrain, [&](int64_t first, int64_t last) {
      std::vector<std::vector<Member>> mine(small.size());
      std::vector<Member> found(kStep);
      sweep(first, last, small.size(), [&](size_t s, int64_t from, int64_t to) {
        const int64_t count = MERGEME_CALL_LOOPS(collect, stretch(small[s], from, to), known_,
                                                 small[s].prefix, found.data());
        mine[s].insert(mine[s].end(), found.begin(), found.begin() + count);
      });
      const std::lock_guard lock(mutex);
      for (size_t s = 0; s < small.size(); ++s)
        members[s].insert(members[s].end(), mine[s].begin(), mine[s].end());
    });
    for (size_t s = 0; s < small.size(); ++s) {
      const auto nth = members[s].begin() + (small[s].rank - 1);
      std::nth_element(members[s].begin(), nth, members[s].end(),
                       [](const Member& a, const Member& b) {
                         return a.bits != b.bits ? a.bits > b.bits : a.index < b.index;
                       });
      finish(small[s], nth->bits, nth->index + 1);
    }
  }

  // All members equal the threshold, and they are many: find the rank-th by counting tiles.
  void locate_tie(const Search& s) const {
    const int64_t tiles = ceil_div(numel_, kTile);
    std::vector<int64_t> counts(tiles);
    at::parallel_for(0, tiles, kGrain / kTile, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        counts[t] = MERGEME_CALL_LOOPS(
            count_members, stretch(s, t * kTile, std::min((t + 1) * kTile, numel_)), 0, s.prefix);
    });
    int64_t rank = s.rank, tile = 0;
    while (counts[tile] < rank) rank -= counts[tile++];
    std::vector<Member> found(kTile);
    const Stretch whole = stretch(s, tile * kTile, std::min((tile + 1) * kTile, numel_));
    MERGEME_CALL_LOOPS(collect, whole, 0, s.prefix, found.data());
    finish(s, s.prefix, found[rank - 1].index + 1);
  }

  const void* base_;
  DType dtype_;
  int64_t numel_;
  int known_;           // magnitude bits still to be found
  const int64_t most_;  // members worth collecting
  std::vector<Search> open_;
};

at::Tensor run_cpu(const at::Tensor& base, at::TensorList tensors, at::IntArrayRef keep) {
  check(base, tensors, keep);
  const at::Tensor from = base.contiguous();
  const HostModels models(tensors);
  const auto num_models = int64_t(tensors.size());
  const at::Tensor out = at::empty({num_models, 2}, base.options().dtype(at::kDouble));
  auto* rows = out.mutable_data_ptr<double>();
  std::vector<Search> searches;
  for (int64_t m = 0; m < num_models; ++m) {
    rows[2 * m] = std::numeric_limits<double>::infinity();  // keeps none
    rows[2 * m + 1] = 0;
    if (keep[m] > 0)
      searches.push_back({.tensor = models.pointers()[m],
                          .out = rows + 2 * m,
                          .rank = keep[m],
                          .members = from.numel()});
  }
  if (!searches.empty()) Selector(from, searches, int(searches.size())).run();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("magnitude_threshold", run_cpu); }

}  // namespace mergeme::magnitude_threshold
