// The key of a given rank, found bit by bit. Torch-free.
#pragma once
#include <cstdint>
#include <limits>

#include "csrc/simt/device.cuh"

namespace mergeme {

// The k-th largest of a set of signed keys, k in [1, size of the set]. count_from(least) says how
// many keys are not below `least`; all threads that call it get the same answer.
template <typename Key, typename Count>
__device__ Key kth_largest(int64_t k, Count count_from) {
  Key last = count_from(Key(0)) >= k ? Key(0) : std::numeric_limits<Key>::min();
  for (int bit = 8 * static_cast<int>(sizeof(Key)) - 2; bit >= 0; --bit) {
    const Key higher = last | (Key(1) << bit);
    if (count_from(higher) >= k) last = higher;
  }
  return last;
}

}  // namespace mergeme
