#pragma once
#include <cstdint>

#include "csrc/common/float8_blocks.h"
#include "csrc/common/grouped_plan.h"

namespace mergeme::grouped_matmul_fp8 {

struct Params {
  void* out;                      // [M, N]
  const float8_e4m3_t* a;         // [M, K]
  const float* a_scale;           // [M, ceil(K / 128)]
  const float8_e4m3_t* b;         // [E, N, K]
  const float* b_scale;           // [E, ceil(N / 128), ceil(K / 128)]
  const int32_t* expert_offsets;  // [E + 1], non-decreasing from 0 to at most num_rows
  grouped::Plan plan;             // scratch of plan_bytes()
  int64_t num_rows;               // M
  int64_t num_experts;            // E, at least 1
  int64_t depth;                  // K
  int64_t columns;                // N
  DType dtype;                    // of out; not float64
  grouped::TileGrid grid = {};    // set by launch()
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::grouped_matmul_fp8
