// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/gram/params.h"

namespace mergeme::gram {

// Elements that are widened at a time for all models, and columns a tile has.
inline constexpr int kStep = 512;
inline constexpr int64_t kTile = 512;

// Doubles of scratch that a call needs, starting at a multiple of 64 bytes.
inline int64_t scratch_size(const Params& p) {
  const int64_t sums =
      num_pairs(p.num_models) * (p.axis == Axis::kRow ? int64_t{kSumLanes} : kTile);
  return p.num_models * kStep + sums;
}

// Writes p.partials of the units [begin, end): a unit is one block of one vector along rows,
// vectors outermost; along columns one block of a tile of vectors, blocks outermost.
MERGEME_DECLARE_LOOPS(void sum_units(const Params& p, int64_t begin, int64_t end, double* scratch);)

}  // namespace mergeme::gram
