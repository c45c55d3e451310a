#pragma once
#include <cstdint>

#include "csrc/common/grouped_plan.h"

namespace mergeme::grouped_matmul {

enum class Layout : int32_t { kNt, kNn, kTn };

struct Params {
  void* out = nullptr;            // nt, nn: [M, N]; tn: [E, N1, N2]
  const void* a;                  // nt, nn: [M, K]; tn: [M, N1]
  const void* b;                  // nt: [E, N, K]; nn: [E, K, N]; tn: [M, N2]
  const int32_t* expert_offsets;  // [E + 1], non-decreasing from 0 to at most num_tokens
  grouped::Plan plan = nullptr;   // nt, nn: scratch of plan_bytes()
  int64_t num_tokens;             // M
  int64_t num_experts;            // E, at least 1
  int64_t a_columns;              // nt, nn: K; tn: N1
  int64_t out_columns;            // nt, nn: N; tn: N2
  Layout layout;
  DType dtype;
  grouped::TileGrid grid = {};  // set by launch()
};

void launch(const Params& params, void* stream);

// Whether torch's own grouped product is faster here and takes these operands: bfloat16 on compute
// capability 9.0 and 10.0, where it has kernels that do not wait for the host, unless the library
// has its own for 9.0. Around it, launch_check() comes first and looks at expert_offsets, and
// launch_zeros() last: it writes the zeros of rows of no expert and of experts without rows.
bool torch_is_faster(const Params& params);
void launch_check(const Params& params, void* stream);
void launch_zeros(const Params& params, void* stream);

}  // namespace mergeme::grouped_matmul
