// The CPU's inner loops: rows [begin, end) of a gate. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/topk_gating/params.h"
#include "csrc/ops/topk_gating/scores.h"

namespace mergeme::topk_gating {

// Room for one row of each array that the loops need, in doubles so that it fits every type.
struct Scratch {
  double* logits;    // [E rounded up to kLanes]
  double* keys;      // [E rounded up to kLanes]
  double* best;      // [E / kLanes rounded up]
  double* selected;  // [K rounded up to kLanes]
};

// `backward` returns the first slot t * K + k whose id is out of range, or -1.
MERGEME_DECLARE_LOOPS(void forward(const Params& p, int64_t begin, int64_t end,
                                   const Scratch& scratch);
                      int64_t backward(const BackwardParams& p, int64_t begin, int64_t end,
                                       const Scratch& scratch);)

}  // namespace mergeme::topk_gating
