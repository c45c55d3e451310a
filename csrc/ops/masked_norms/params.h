#pragma once
#include <cstdint>

#include "csrc/common/task_vector.h"

namespace mergeme::masked_norms {

// The order in which every backend sums, so that all give the same bits: within a block of 4096
// elements lane l adds the elements l, l + 128, l + 256, ...; the lanes are folded in halves, lane
// l taking lane l + 64, then l + 32, ...; the blocks are added in index order. All of it in
// float64.
inline constexpr int kSumBlock = 4096;
inline constexpr int kLanes = 128;
inline constexpr int kNorms = 6;  // l1, l2, linf of x, then of the masked x; sums of squares for l2

struct Params {
  double* out;                 // [M, 6]
  const void* base;            // [numel]
  const void* const* tensors;  // [M] -> [numel]
  const double* selection;     // [M, selection_width(mask)]
  void* terms;                 // [M] Term of the accumulation type: scratch
  double* partials;            // [M, blocks, 6]: scratch
  int64_t num_models;
  int64_t numel;
  uint64_t key;
  Mask mask;
  DType dtype;
};

// Bytes `terms` needs for one model.
inline constexpr int64_t kTermBytes = sizeof(Term<double>);

// The greater of two maxima of magnitudes; NaN is the greatest.
MERGEME_HD double greater(double a, double b) { return b > a || b != b ? b : a; }

void launch(const Params& params, void* stream);

}  // namespace mergeme::masked_norms
