#pragma once
#include <algorithm>
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::sort_by_expert {

// Slots s = t * K + k are cut into chunks, one for each warp of the counting and placing kernels.
struct Params {
  const int32_t* ids;    // [S], each in [0, E)
  int32_t* offsets;      // [E + 1], out
  int32_t* permutation;  // [S], out: position -> slot
  int32_t* inverse;      // [S], out: slot -> position
  int32_t* counts;       // [E, C] scratch: of each chunk's slots, then where the first one goes
  int64_t num_slots;     // S, below 2^31
  int64_t num_experts;
  int64_t chunk;       // slots of a chunk, a multiple of 32
  int64_t num_chunks;  // C, at least 1
};

// Chunks long enough that counts has at most S + E entries, and few enough that one block scans it.
inline int64_t chunk_size(int64_t num_slots, int64_t num_experts) {
  constexpr int64_t kMinChunk = 512, kMaxChunks = 4096;
  const int64_t wanted = std::max({kMinChunk, num_experts, ceil_div(num_slots, kMaxChunks)});
  return ceil_div(wanted, 32) * 32;
}
inline int64_t count_chunks(int64_t num_slots, int64_t chunk) {
  return std::max<int64_t>(1, ceil_div(num_slots, chunk));
}

void launch(const Params& params, void* stream);

}  // namespace mergeme::sort_by_expert
