// The CPU half's inner loops, one copy per instruction set. Torch-free.
#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/task_vector.h"

namespace mergeme::magnitude_threshold {

inline constexpr int kCpuDigitBits = 16;

// A stretch of one model's task vector x = tensor - base.
struct Stretch {
  const void* base;    // [numel]
  const void* tensor;  // [numel]
  DType dtype;
  int64_t begin, end;
};

struct Member {
  uint64_t bits;  // of the magnitude
  int64_t index;
};

// "Members" are the elements whose magnitude bits, shifted right by `known`, equal `prefix`.
//
// count_digits: counts[d] += members whose digit, the `digit_bits` below the prefix, is d.
// collect: writes the members in index order and returns their number; `out` has room for all.
MERGEME_DECLARE_LOOPS(void count_digits(const Stretch& s, int known, uint64_t prefix,
                                        int digit_bits, uint32_t* counts);
                      int64_t count_members(const Stretch& s, int known, uint64_t prefix);
                      int64_t collect(const Stretch& s, int known, uint64_t prefix, Member* out);)

}  // namespace mergeme::magnitude_threshold
