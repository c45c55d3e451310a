// Philox4x32-10, a counter-based generator: the same (key, counter) gives the same four words on
// every device. Torch-free.
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "csrc/common/numeric.h"

namespace mergeme {

struct PhiloxWords {
  uint32_t w[4];
};

MERGEME_HD PhiloxWords philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words that decide elements 8 * group to 8 * group + 7 of model `model`: element 8 * group + e
// has the 16 bits of word e / 2, low half first.
inline constexpr int kDecisionsPerGroup = 8;
MERGEME_HD PhiloxWords drop_words(uint64_t key, uint64_t group, uint32_t model) {
  return philox(key, uint32_t(group), uint32_t(group >> 32), model, 0);
}

}  // namespace mergeme
