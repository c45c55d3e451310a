// The tensor map of the interpreter: a real one is opaque, so that whoever launches writes this one
// into the same 128 bytes. python_tests/support/ptx.py has its twin, tensor_map().
#pragma once
#include <cstdint>

namespace mergeme::ptx {

struct TensorMap {
  static constexpr uint64_t kMagic = 0x50414d54584d5650;
  static constexpr int kMaxRank = 5;

  uint64_t magic;
  uint64_t address;                // of element 0, in global memory
  uint32_t rank;                   // dimensions run from the innermost out
  uint32_t format;                 // as CUtensorMapDataType numbers them
  uint64_t dims[kMaxRank];         // in elements
  uint64_t strides[kMaxRank - 1];  // bytes, of dimension 1 and on
  uint16_t box[kMaxRank];          // in elements
  uint8_t element_strides[kMaxRank];
  uint8_t swizzle;  // 0 none, else the rows have 16 << swizzle bytes
  uint8_t fill;     // 1: outside the tensor NaNs instead of zeros
  uint8_t element_bytes;
  uint8_t interleave;  // 0: the only one we know
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace mergeme::ptx
