#pragma once
#include <algorithm>
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::sort_by_expert {

// Slots s = t * K + k are cut into chunks, one for each warp of the counting and placing kernels.
struct Params {
  const int32_t* ids;    // [S], each in [0, B)
  int32_t* offsets;      // [E + 1], out
  int32_t* permutation;  // [S], out: position -> slot
  int32_t* inverse;      // [S], out: slot -> position
  int32_t* counts;       // [B, C] scratch: of each chunk's slots, then where the first one goes
  int64_t num_slots;     // S, below 2^31
  int64_t num_experts;   // E
  int64_t num_buckets;   // B: E, or E + 1 with one behind the experts for slots that have none
  int64_t chunk;         // slots of a chunk, a multiple of 32
  int64_t num_chunks;    // C, at least 1
};

// Which of the sorted slots keep their expert when it takes no more than `capacity`.
struct DropParams {
  const int32_t* ids;          // [S], each in [0, E]
  const int32_t* offsets;      // [E + 1]
  const int32_t* permutation;  // [S]
  const void* priority;        // [S], float, or double if wide; null: the earlier slots stay
  int32_t* kept_ids;           // [S], out: ids, or E where dropped
  int64_t num_slots;
  int64_t num_experts;
  int64_t capacity;
  bool wide;
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
void launch_drop(const DropParams& params, void* stream);

}  // namespace mergeme::sort_by_expert
