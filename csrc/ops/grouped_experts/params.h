#pragma once
#include <cstdint>

#include "csrc/common/grouped_plan.h"
#include "csrc/ops/grouped_experts/activation.h"

namespace mergeme::grouped_experts {

// What forward and backward share. S = T * K slots; slot t * K + k is token t's k-th choice. Slots
// sorted by expert are rows; those from expert_offsets[E] on belong to no expert.
struct Common {
  const void* x;                  // [T, H]
  const void* gate_up;            // [E, 2I, H], gate rows before up rows
  const void* down;               // [E, H, I]
  const void* topk_weights;       // [T, K] in the accumulation type
  const int32_t* expert_offsets;  // [E + 1], non-decreasing from 0 to at most S
  const int32_t* permutation;     // [S], row -> slot
  const int32_t* inverse;         // [S], slot -> row
  grouped::Plan plan;             // scratch of plan_bytes()
  int32_t* tokens;                // [S], scratch, row -> token
  int64_t num_tokens;             // T
  int64_t top_k;                  // K
  int64_t num_experts;            // E, at least 1
  int64_t hidden;                 // H
  int64_t intermediate;           // I
  Activation kind;
  DType dtype;
  grouped::TileGrid grid = {};  // set by launch()
  int64_t num_slots() const { return num_tokens * top_k; }
};

struct Params : Common {
  void* out;            // [T, H]
  void* preactivation;  // [S, 2I] or null; zero for rows of no expert
  void* activation;     // [S, I], scratch
  void* expert_out;     // [S, H], scratch in the accumulation type
};

// Gradients that nobody asked for are null.
struct BackwardParams : Common {
  void* grad_x;               // [T, H]
  void* grad_gate_up;         // [E, 2I, H]
  void* grad_down;            // [E, H, I]
  void* grad_weights;         // [T, K] in the accumulation type
  const void* grad;           // [T, H]
  const void* preactivation;  // [S, 2I]
  void* grad_preactivation;   // [S, 2I], scratch
  void* weighted;             // [S, I], scratch: activation times weight
  void* grad_rows;            // [S, H], scratch in the accumulation type
  void* weight_parts;         // [S, num_weight_parts()], scratch in the accumulation type
};

// <grad, expert output> of a row is summed in parts of 64 or 128 columns.
inline int64_t num_weight_parts(int64_t intermediate) { return ceil_div(intermediate, 64); }

void launch(const Params& params, void* stream);
void launch_backward(const BackwardParams& params, void* stream);

}  // namespace mergeme::grouped_experts
