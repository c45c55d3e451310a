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
  int64_t limit;  // reading goes on up to here, so elements up to here may be fetched ahead
};

struct Member {
  uint64_t bits;  // of the magnitude
  int64_t index;
};

// "Members" are the elements whose magnitude bits, shifted right by `known`, equal `prefix`.
//
// count_digits: counts[d] += members whose digit, the `digit_bits` below the prefix, is d.
// count_members: their number.
// collect: writes the elements with magnitude bits in [low, high], in index order, and returns
// their number; `out` has room for the whole stretch. Adds the number of those above to *above.
MERGEME_DECLARE_LOOPS(void count_digits(const Stretch& s, int known, uint64_t prefix,
                                        int digit_bits, uint32_t* counts);
                      int64_t count_members(const Stretch& s, int known, uint64_t prefix);
                      int64_t collect(const Stretch& s, uint64_t low, uint64_t high, Member* out,
                                      int64_t* above);)

}  // namespace mergeme::magnitude_threshold
