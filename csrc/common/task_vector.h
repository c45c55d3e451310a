// What the merge ops share about task vectors x = tensor - base: magnitudes as integers, and which
// elements a mask keeps. Torch-free.
#pragma once
#include <cmath>

#include "csrc/common/numeric.h"
#include "csrc/common/philox.h"

namespace mergeme {

enum class Mask : int32_t { kAll, kMagnitude, kRandom };

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

// One model's part in a merge, ready for the inner loop. Acc is the accumulation type.
template <typename Acc>
struct Term {
  const void* data;  // [numel]
  Acc coefficient;   // weight * scale
  Acc weight;
  // An element is kept iff its magnitude bits reach `cut_before` at flat indices below `tie_end`,
  // and `cut_after` from there on. NaN reaches every cut. A random mask does not look at them.
  magnitude_t<Acc> cut_before, cut_after;
  int64_t tie_end;
  uint32_t keep_below;  // random mask: kept iff the element's 16 random bits are below this
};

// `first` and `second` are the model's row of the selection. A threshold that Acc cannot represent
// is compared as it is: no element then equals it.
template <typename Acc>
MERGEME_HD Term<Acc> make_term(const void* data, double weight, double scale, Mask mask,
                               double first, double second) {
  Term<Acc> term{};
  term.data = data;
  term.coefficient = static_cast<Acc>(weight * scale);
  term.weight = static_cast<Acc>(weight);
  if (mask == Mask::kRandom) {
    term.keep_below = static_cast<uint32_t>(rint(first * 65536));
  } else if (mask == Mask::kMagnitude) {
    using Bits = magnitude_t<Acc>;
    constexpr Bits infinity = Magnitude<Acc>::kInfinity;
    const Acc cut = static_cast<Acc>(first);
    const Bits bits = magnitude_bits(cut);
    if (first < 0) {
      term.cut_before = term.cut_after = 0;
    } else if (!(first <= static_cast<double>(magnitude_of(infinity)))) {  // NaN
      term.cut_before = term.cut_after = infinity + 1;
    } else if (static_cast<double>(cut) > first) {
      term.cut_before = term.cut_after = bits;
    } else {
      term.cut_before = static_cast<double>(cut) == first ? bits : bits + 1;
      term.cut_after = bits + 1;
    }
    constexpr double kMost = 9007199254740992.0;  // 2^53: beyond it not every index is a double
    term.tie_end = static_cast<int64_t>(second > 0 ? (second < kMost ? second : kMost) : 0);
  }
  return term;
}

}  // namespace mergeme
