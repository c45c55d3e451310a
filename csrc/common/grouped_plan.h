// The list of row tiles of a grouped product, which the device builds from expert_offsets so that
// the host never reads them. Torch-free.
#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::grouped {

// One entry for each tile of `height` rows; a tile never straddles two groups. All tiles of a group
// carry the same entry. Group e < E is expert e; group E holds the rows from expert_offsets[E] on,
// which belong to no expert.
struct alignas(16) GroupTile {
  int32_t group;
  int32_t begin;  // the group's rows
  int32_t end;
  int32_t first;  // the number of the group's first tile
};

// The list as it lies in memory: the number of tiles in the first entry's `first`, then the tiles.
using Plan = GroupTile*;

inline constexpr int64_t kSmallestTile = 16;

// Tiles that any boundaries can need: every group wastes less than one.
MERGEME_HD int64_t max_row_tiles(int64_t rows, int64_t num_experts, int64_t height) {
  return rows / height + num_experts + 1;
}

// Bytes of a plan for tiles of any height.
inline int64_t plan_bytes(int64_t rows, int64_t num_experts) {
  return (max_row_tiles(rows, num_experts, kSmallestTile) + 1) * int64_t{sizeof(GroupTile)};
}

// The tiles of a launch, counted by the host: kernels short of registers read them where they lie.
struct TileGrid {
  int32_t row_tiles;  // of one matrix, where there is one for each expert
  int32_t column_tiles;
  int32_t matrix_tiles;  // row_tiles * column_tiles
  int32_t count;         // of all; an upper bound where rows are planned
};

}  // namespace mergeme::grouped
