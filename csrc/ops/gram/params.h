#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::gram {

// kRow: a vector's elements follow each other, and so do the vectors. kColumn: element e of vector
// g is at e * groups + g.
enum class Axis : int32_t { kRow, kColumn };

// The order in which every backend sums, so that all give the same bits. Products are formed and
// summed in float64, in which a product of two float32 numbers is exact. Along rows, lane l of a
// block of 4096 elements adds the elements l, l + 32, l + 64, ...; the lanes are folded in halves,
// lane l taking lane l + 16, then l + 8, ...; the blocks are added in index order. Along columns a
// block is 256 elements, added in index order, and so are the blocks.
inline constexpr int kRowBlock = 4096;
inline constexpr int kSumLanes = 32;
inline constexpr int kColumnBlock = 256;

struct Params {
  double* out;                 // [groups, M, M]
  const void* base;            // [groups * length] or null
  const void* const* tensors;  // [M] -> [groups * length]
  double* partials;            // kRow [groups, blocks, pairs], kColumn [blocks, pairs, groups]
  int64_t num_models;
  int64_t groups;
  int64_t length;
  int64_t blocks;  // of each vector
  Axis axis;
  DType dtype;
};

// The pairs i <= j of M models, in the order (0, 0), (0, 1), (1, 1), (0, 2), ...
MERGEME_HD int64_t num_pairs(int64_t num_models) { return num_models * (num_models + 1) / 2; }
MERGEME_HD int64_t pair_of(int64_t i, int64_t j) { return j * (j + 1) / 2 + i; }

inline int64_t num_blocks(Axis axis, int64_t length) {
  return ceil_div(length, axis == Axis::kRow ? kRowBlock : kColumnBlock);
}

void launch(const Params& params, void* stream);

}  // namespace mergeme::gram
