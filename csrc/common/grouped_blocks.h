// How the CPU half cuts grouped products into blocks: limits shared by planner and loops.
#pragma once
#include <cstddef>
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme {

// One block of one group's product: out [rows, columns], reduced over depth. Pointers are at the
// block's first element; ld* are row strides in elements. Layouts are the ops' (nt, nn, tn).
struct GroupedBlock {
  const void* a;
  const void* b;
  void* out;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int64_t lda;
  int64_t ldb;
  int64_t ldo;
  DType dtype;
};

// Reduction steps packed at once: 12 broadcast rows of them fit a first-level cache with room.
inline constexpr int64_t kBlockDepth = 256;
// Largest block: the vector side's panels and the sums then take some 500 KB of second-level cache.
inline constexpr int64_t kMaxBlockV = 256;
inline constexpr int64_t kMaxBlockSums = 512 * 128;
inline constexpr int64_t kMaxBroadcasts = 12;
inline constexpr int64_t kMaxVectorBytes = 64;
// Up to here a group's rows do not pay for packing the weights (one vector would be half empty).
inline constexpr int64_t kFewRows = 8;

// Upper bound, whatever the element type and instruction set, of the scratch one block needs.
inline constexpr int64_t kBlockScratchBytes =
    8 * (kBlockDepth * kMaxBlockV + kMaxBroadcasts * (kBlockDepth + 16) +
         (kMaxBlockSums + kMaxBroadcasts * kMaxBlockV + 1024 * kMaxVectorBytes));

}  // namespace mergeme
