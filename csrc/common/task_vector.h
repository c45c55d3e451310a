// What the merge ops share about task vectors x = tensor - base: magnitudes as integers, and which
// elements a mask keeps. Torch-free.
#pragma once
#include <cmath>

#include "csrc/common/numeric.h"
#include "csrc/common/philox.h"

namespace mergeme {

enum class Mask : int32_t { kAll, kMagnitude, kRandom, kBand };

// Numbers in a model's row of the selection.
MERGEME_HD int64_t selection_width(Mask mask) { return mask == Mask::kBand ? 4 : 2; }

// The bits of |x|. As integers they order like magnitudes, with NaN above infinity.
MERGEME_HD uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7fffffffu; }
MERGEME_HD uint64_t magnitude_bits(double x) { return bits_of(x) & 0x7fffffffffffffffull; }
MERGEME_HD float magnitude_of(uint32_t bits) { return float_of(bits); }
MERGEME_HD double magnitude_of(uint64_t bits) { return double_of(bits); }

template <typename Acc>
struct Magnitude {
  using Bits = uint32_t;
  static constexpr int kBits = 31;
  static constexpr Bits kInfinity = 0x7f800000u;
};
template <>
struct Magnitude<double> {
  using Bits = uint64_t;
  static constexpr int kBits = 63;
  static constexpr Bits kInfinity = 0x7ff0000000000000ull;
};
template <typename Acc>
using magnitude_t = typename Magnitude<Acc>::Bits;

// Where magnitudes are cut: an element reaches the cut iff its magnitude bits are at least `before`
// at flat indices below `tie_end`, and at least `after` from there on. NaN reaches every cut.
template <typename Acc>
struct Cut {
  magnitude_t<Acc> before, after;
  int64_t tie_end;

  // How many of the n elements from flat index `first` on lie before tie_end.
  MERGEME_HD int ties(int64_t first, int n) const {
    const int64_t left = tie_end - first;
    return left < 0 ? 0 : left < n ? int(left) : n;
  }
};

// A threshold that Acc cannot represent is compared as it is: no element then equals it.
template <typename Acc>
MERGEME_HD Cut<Acc> make_cut(double threshold, double tie_end) {
  using Bits = magnitude_t<Acc>;
  constexpr Bits infinity = Magnitude<Acc>::kInfinity;
  Cut<Acc> cut{};
  const Acc near = static_cast<Acc>(threshold);
  const Bits bits = magnitude_bits(near);
  if (threshold < 0) {
    cut.before = cut.after = 0;
  } else if (!(threshold <= static_cast<double>(magnitude_of(infinity)))) {  // NaN
    cut.before = cut.after = infinity + 1;
  } else if (static_cast<double>(near) > threshold) {
    cut.before = cut.after = bits;
  } else {
    cut.before = static_cast<double>(near) == threshold ? bits : bits + 1;
    cut.after = bits + 1;
  }
  constexpr double kMost = 9007199254740992.0;  // 2^53: beyond it not every index is a double
  cut.tie_end = static_cast<int64_t>(tie_end > 0 ? (tie_end < kMost ? tie_end : kMost) : 0);
  return cut;
}

// One model's part in a merge, ready for the inner loop. Acc is the accumulation type.
template <typename Acc>
struct Term {
  const void* data;  // [numel]
  Acc coefficient;   // weight * scale
  Acc weight;
  Cut<Acc> cut;         // kept iff the element reaches it; a random mask does not look at it
  Cut<Acc> top;         // band: dropped iff the element reaches it and is no NaN
  uint32_t keep_below;  // random mask: kept iff the element's 16 random bits are below this
};

// `row` is the model's row of the selection, of selection_width numbers.
template <typename Acc>
MERGEME_HD Term<Acc> make_term(const void* data, double weight, double scale, Mask mask,
                               const double* row) {
  Term<Acc> term{};
  term.data = data;
  term.coefficient = static_cast<Acc>(weight * scale);
  term.weight = static_cast<Acc>(weight);
  if (mask == Mask::kRandom) term.keep_below = static_cast<uint32_t>(rint(row[0] * 65536));
  if (mask == Mask::kMagnitude || mask == Mask::kBand) term.cut = make_cut<Acc>(row[0], row[1]);
  if (mask == Mask::kBand) term.top = make_cut<Acc>(row[2], row[3]);
  return term;
}

// Whether magnitude bits reach `low` and not `high`; NaN is in every band.
template <typename Acc>
MERGEME_HD bool in_band(magnitude_t<Acc> bits, magnitude_t<Acc> low, magnitude_t<Acc> high) {
  return bits >= low && (bits < high || bits > Magnitude<Acc>::kInfinity);
}

}  // namespace mergeme
