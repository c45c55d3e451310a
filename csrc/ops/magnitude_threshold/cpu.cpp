#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "csrc/ops/magnitude_threshold/checks.h"
#include "csrc/ops/magnitude_threshold/cpu_loops.h"

namespace mergeme::magnitude_threshold {
namespace {

constexpr int64_t kGrain = 1 << 18;  // elements that repay a thread's histogram of 2^16 bins
constexpr int64_t kStep = 4096;  // elements read for all models before going on: base stays near
constexpr int64_t kTile = 1 << 16;

// One model's search for its threshold: the rank-th largest of the elements whose magnitude bits
// lie in [low, high].
struct Search {
  const void* tensor;
  double* out;  // [2]
  int64_t rank;
  int64_t members = 0;  // how many lie there
  uint64_t low = 0, high = 0;
};

// A sample says between which magnitudes the threshold very likely lies; one pass counts what is
// above and collects what is between, to select among. Where the sample was wrong, or would have
// most elements collected (many equal ones), the bits are found digit by digit instead, the highest
// first, from histograms, until the members are few. All counts are integers and the threshold is
// unique, so neither the road taken nor the number of threads can show.
class Selector {
 public:
  Selector(const at::Tensor& base, std::vector<Search> searches)
      : base_(base.const_data_ptr()),
        dtype_(dtype_of(base)),
        numel_(base.numel()),
        known_(dtype_ == DType::kFloat64 ? Magnitude<double>::kBits : Magnitude<float>::kBits),
        most_(std::max<int64_t>(
            4096, std::min<int64_t>((1 << 22) / int64_t(searches.size()), numel_ / 32))),
        open_(std::move(searches)) {
    for (Search& s : open_) {
      s.members = numel_;
      s.low = 0;
      s.high = (uint64_t{1} << known_) - 1;
    }
  }

  void run() {
    if (numel_ >= kWorthSampling) search_between_samples();
    for (;;) {
      collect_small();
      if (open_.empty()) return;
      if (known_ == 0) break;
      find_digit();
    }
    for (const Search& s : open_) locate_tie(s);
  }

 private:
  static constexpr int64_t kWorthSampling = 1 << 18;

  Stretch stretch(const Search& s, int64_t begin, int64_t end, int64_t limit) const {
    return {base_, s.tensor, dtype_, begin, end, limit};
  }

  void finish(const Search& s, uint64_t bits, int64_t tie_end) const {
    const double threshold =
        dtype_ == DType::kFloat64 ? magnitude_of(bits) : double{magnitude_of(uint32_t(bits))};
    if (threshold == threshold) {
      s.out[0] = threshold;
      s.out[1] = static_cast<double>(tie_end);
    }  // else NaNs alone fill the count: they are kept anyway, and the cut stays above infinity
  }

  // The `rank`-th largest of `members`, of equal ones the lower index first.
  void select(const Search& s, std::vector<Member>& members, int64_t rank) const {
    const auto nth = members.begin() + (rank - 1);
    std::nth_element(members.begin(), nth, members.end(), [](const Member& a, const Member& b) {
      return a.bits != b.bits ? a.bits > b.bits : a.index < b.index;
    });
    finish(s, nth->bits, nth->index + 1);
  }

  // Calls step(search number, begin, end, limit) over a thread's elements, all searches in turn.
  template <typename F>
  void sweep(int64_t begin, int64_t end, size_t searches, const F& step) const {
    for (int64_t i = begin; i < end; i += kStep)
      for (size_t s = 0; s < searches; ++s) step(s, i, std::min(i + kStep, end), end);
  }

  // Collects the members of each search and counts the elements above them.
  void collect(const std::vector<Search>& searches, std::vector<std::vector<Member>>& members,
               std::vector<int64_t>& above) const {
    members.resize(searches.size());
    above.resize(searches.size());
    std::mutex mutex;
    at::parallel_for(0, numel_, kGrain, [&](int64_t first, int64_t last) {
      std::vector<std::vector<Member>> mine(searches.size());
      std::vector<int64_t> over(searches.size());
      std::vector<Member> found(kStep);
      for (size_t s = 0; s < searches.size(); ++s)  // growing would copy, and touch new pages
        mine[s].reserve((last - first) / 32);
      sweep(first, last, searches.size(), [&](size_t s, int64_t from, int64_t to, int64_t limit) {
        const Search& search = searches[s];
        const int64_t count = MERGEME_CALL_LOOPS(collect, stretch(search, from, to, limit),
                                                 search.low, search.high, found.data(), &over[s]);
        mine[s].insert(mine[s].end(), found.begin(), found.begin() + count);
      });
      const std::lock_guard lock(mutex);
      for (size_t s = 0; s < searches.size(); ++s) {
        if (members[s].empty())
          members[s] = std::move(mine[s]);
        else
          members[s].insert(members[s].end(), mine[s].begin(), mine[s].end());
        above[s] += over[s];
      }
    });
  }

  // Narrows low and high to what a sample says, five standard deviations to either side of the
  // rank; false where too many elements would lie between.
  bool narrow(Search& s) const {
    constexpr int64_t kRun = 16;  // neighbours share a cache line
    const int64_t runs = std::clamp<int64_t>(numel_ / 4096, 4096, 1 << 18);
    std::vector<Member> sample(runs * kRun);
    int64_t size = 0, above = 0;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t begin = r * (numel_ / runs);
      const Stretch part = stretch(s, begin, std::min(begin + kRun, numel_), 0);
      size += MERGEME_CALL_LOOPS(collect, part, s.low, s.high, sample.data() + size, &above);
    }
    const double density = double(s.rank) / double(numel_);
    const double middle = density * double(size);
    const double spread = 5 * std::sqrt(middle * (1 - density)) + kRun;
    const auto first = int64_t(middle - spread), last = int64_t(middle + spread) + 1;
    const auto by_bits = [](const Member& a, const Member& b) { return a.bits > b.bits; };
    if (first > 0) {
      std::nth_element(sample.begin(), sample.begin() + first, sample.begin() + size, by_bits);
      s.high = sample[first].bits;
    }
    if (last < size) {
      const auto from = sample.begin() + std::max<int64_t>(first, 0);
      std::nth_element(from, sample.begin() + last, sample.begin() + size, by_bits);
      s.low = sample[last].bits;
    }
    const auto between = std::count_if(sample.begin(), sample.begin() + size, [&](const Member& a) {
      return a.bits >= s.low && a.bits <= s.high;
    });
    return between <= size / 16;
  }

  void search_between_samples() {
    std::vector<Search> narrowed, wide;
    for (const Search& s : open_) {
      Search copy = s;
      if (narrow(copy))
        narrowed.push_back(copy);
      else
        wide.push_back(s);
    }
    std::vector<std::vector<Member>> members;
    std::vector<int64_t> above;
    if (!narrowed.empty()) collect(narrowed, members, above);
    for (size_t s = 0; s < narrowed.size(); ++s) {
      const int64_t rank = narrowed[s].rank - above[s];
      if (rank > 0 && rank <= int64_t(members[s].size())) {
        select(narrowed[s], members[s], rank);
      } else {
        narrowed[s].low = 0;
        narrowed[s].high = (uint64_t{1} << known_) - 1;
        wide.push_back(narrowed[s]);
      }
    }
    open_ = std::move(wide);
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
              [&](size_t s, int64_t from, int64_t to, int64_t limit) {
                MERGEME_CALL_LOOPS(count_digits, stretch(open_[s], from, to, limit), known_,
                                   open_[s].low >> known_, digit_bits, counts.data() + s * bins);
              });
        const std::lock_guard lock(mutex);
        for (size_t b = 0; b < total.size(); ++b) total[b] += counts[b];
      }
    });
    known_ -= digit_bits;
    for (size_t s = 0; s < open_.size(); ++s) {
      const int64_t* counts = total.data() + s * bins;
      size_t digit = bins - 1;
      while (counts[digit] < open_[s].rank) open_[s].rank -= counts[digit--];
      open_[s].members = counts[digit];
      open_[s].low |= uint64_t{digit} << known_;
      open_[s].high = open_[s].low | ((uint64_t{1} << known_) - 1);
    }
  }

  // Finishes the searches that have few members left.
  void collect_small() {
    const auto middle = std::partition(open_.begin(), open_.end(),
                                       [&](const Search& s) { return s.members > most_; });
    const std::vector<Search> small(middle, open_.end());
    open_.erase(middle, open_.end());
    if (small.empty()) return;
    std::vector<std::vector<Member>> members;
    std::vector<int64_t> above;
    collect(small, members, above);
    for (size_t s = 0; s < small.size(); ++s) select(small[s], members[s], small[s].rank);
  }

  // All members equal the threshold, and they are many: find the rank-th by counting tiles.
  void locate_tie(const Search& s) const {
    const int64_t tiles = ceil_div(numel_, kTile);
    const auto tile = [&](int64_t t) {
      const int64_t end = std::min((t + 1) * kTile, numel_);
      return stretch(s, t * kTile, end, end);
    };
    std::vector<int64_t> counts(tiles);
    at::parallel_for(0, tiles, kGrain / kTile, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        counts[t] = MERGEME_CALL_LOOPS(count_members, tile(t), 0, s.low);
    });
    int64_t rank = s.rank, t = 0, above = 0;
    while (counts[t] < rank) rank -= counts[t++];
    std::vector<Member> found(kTile);
    MERGEME_CALL_LOOPS(collect, tile(t), s.low, s.high, found.data(), &above);
    finish(s, s.low, found[rank - 1].index + 1);
  }

  const void* base_;
  DType dtype_;
  int64_t numel_;
  int known_;           // the lowest bits, still to be found digit by digit
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
      searches.push_back({.tensor = models.pointers()[m], .out = rows + 2 * m, .rank = keep[m]});
  }
  if (!searches.empty()) Selector(from, std::move(searches)).run();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("magnitude_threshold", run_cpu); }

}  // namespace mergeme::magnitude_threshold
