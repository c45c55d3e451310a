#pragma once
#include <cstdint>

#include "csrc/common/float8_blocks.h"

namespace mergeme::quantize_fp8 {

struct Params {
  float8_e4m3_t* q;  // [S, K]
  float* scale;      // [S, blocks]
  const void* x;     // [S, K]
  int64_t num_rows;  // S
  int64_t columns;   // K
  int64_t blocks;    // ceil(K / 128)
  DType dtype;       // of x; not float64
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::quantize_fp8
