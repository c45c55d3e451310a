#pragma once
#include <cstdint>

#include "csrc/common/float8_blocks.h"
#include "csrc/common/grouped_plan.h"
#include "csrc/ops/grouped_experts/activation.h"

namespace mergeme::grouped_experts_fp8 {

using grouped_experts::Activation;

// S = T * K slots; slot t * K + k is token t's k-th choice. Slots sorted by expert are rows; those
// from expert_offsets[E] on belong to no expert. A scale goes with each 128 along a row.
struct Params {
  void* out;                      // [T, H]
  const void* x;                  // [T, H]
  const float8_e4m3_t* gate_up;   // [E, 2I, H], gate rows before up rows
  const float* gate_up_scale;     // [E, 2 ceil(I / 128), ceil(H / 128)], gate's before up's
  const float8_e4m3_t* down;      // [E, H, I]
  const float* down_scale;        // [E, ceil(H / 128), ceil(I / 128)]
  const float* topk_weights;      // [T, K]
  const int32_t* expert_offsets;  // [E + 1], non-decreasing from 0 to at most S
  const int32_t* permutation;     // [S], row -> slot
  const int32_t* inverse;         // [S], slot -> row
  grouped::Plan plan;             // scratch of plan_bytes()
  int32_t* tokens;                // [S], scratch, row -> token
  float8_e4m3_t* quantized;       // [T, H], scratch: x
  float* quantized_scale;         // [T, ceil(H / 128)], scratch
  float* activation;              // [S, I], scratch
  float8_e4m3_t* activation_q;    // [S, I], scratch
  float* activation_scale;        // [S, ceil(I / 128)], scratch
  float* expert_out;              // [S, H], scratch
  int64_t num_tokens;             // T
  int64_t top_k;                  // K
  int64_t num_experts;            // E, at least 1
  int64_t hidden;                 // H
  int64_t intermediate;           // I
  Activation kind;
  DType dtype;                  // of x and out; not float64
  grouped::TileGrid grid = {};  // set by launch()
  MERGEME_HD int64_t num_slots() const { return num_tokens * top_k; }
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::grouped_experts_fp8
