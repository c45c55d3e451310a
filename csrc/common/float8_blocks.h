// How e4m3 numbers and the scales beside them lie in memory, as in DeepSeek-V3's checkpoints.
// Torch-free.
#pragma once
#include <cfloat>
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme {

// A scale goes with 128 neighbours along the depth of a product: of one row of activations, or of
// 128 rows of weights. The last block of a row, and of rows, may be smaller.
inline constexpr int64_t kScaleBlock = 128;

MERGEME_HD int64_t scale_blocks(int64_t length) { return ceil_div(length, kScaleBlock); }

// |x| as bits, in which order is the numbers' own; 0 for NaN and infinities: they take no part in a
// block's scale.
MERGEME_HD uint32_t scale_magnitude(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  return magnitude < 0x7f800000u ? magnitude : 0;
}

// The scale of a block whose largest magnitude is `largest`: that becomes 448. Never subnormal, so
// that x / scale is a number.
MERGEME_HD float scale_of(float largest) {
  const float scale = largest / kMaxFloat8;
  return largest == 0 ? 1.f : scale < FLT_MIN ? FLT_MIN : scale;
}

}  // namespace mergeme
