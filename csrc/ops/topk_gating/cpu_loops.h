// The CPU's inner loops: rows [begin, end) of a gate. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/ops/topk_gating/params.h"
#include "csrc/ops/topk_gating/scores.h"

namespace mergeme::topk_gating {

inline constexpr int kRows = 4;  // tokens that are in work together

// Room for the arrays of one row, in doubles so that it fits every type: logits, their keys,
// their shares, the selected logits, each padded to whole blocks of kLanes, the largest key of each
// block, and two keys of each group. Or else for a tile of at most 16 rows: logits, keys, and a row
// of shares, in float, and two keys of each of a row's groups; or a row of logits and a tile of
// shares.
MERGEME_HD int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }
MERGEME_HD int64_t row_room(int64_t num_experts, int64_t top_k, int64_t num_groups) {
  return 3 * padded(num_experts) + padded(top_k + 1) + padded(ceil_div(num_experts, kLanes)) +
         2 * padded(num_groups);
}
inline int64_t row_room(const Params& p) { return row_room(p.num_experts, p.top_k, p.num_groups); }
inline int64_t row_room(const BackwardParams& p) { return row_room(p.num_experts, p.top_k, 0); }
template <typename P>
int64_t room_size(const P& p) {
  constexpr int64_t kMaxTile = 16;
  const int64_t tile = (kMaxTile + 1) * padded(p.num_experts) + kMaxGroups;
  const int64_t rows = kRows * row_room(p);
  return tile > rows ? tile : rows;
}

// `room` is room_size(p) doubles. `backward` returns the first slot t * K + k whose id is
// out of range, or -1.
MERGEME_DECLARE_LOOPS(void forward(const Params& p, int64_t begin, int64_t end, double* room);
                      int64_t backward(const BackwardParams& p, int64_t begin, int64_t end,
                                       double* room);)

}  // namespace mergeme::topk_gating
