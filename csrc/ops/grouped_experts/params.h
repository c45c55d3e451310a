#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::grouped_experts {

// S = T * K slots; slot t * K + k is token t's k-th choice. Slots sorted by expert are rows.
struct Params {
  void* out;                      // [T, H]
  void* activation;               // [S, I], scratch
  void* expert_out;               // [S, H], scratch in the accumulation type
  const void* x;                  // [T, H]
  const void* gate_up;            // [E, 2I, H], gate rows before up rows
  const void* down;               // [E, H, I]
  const void* topk_weights;       // [T, K] in the accumulation type
  const int32_t* expert_offsets;  // [E + 1], non-decreasing from 0 to S
  const int32_t* permutation;     // [S], row -> slot
  const int32_t* inverse;         // [S], slot -> row
  int64_t num_tokens;             // T
  int64_t top_k;                  // K
  int64_t num_experts;            // E, at least 1
  int64_t hidden;                 // H
  int64_t intermediate;           // I
  DType dtype;
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::grouped_experts
