#include "csrc/ops/magnitude_threshold/cpu_loops.h"

#include "csrc/common/cpu_blocks.h"

namespace mergeme::magnitude_threshold::MERGEME_ISA {
namespace {

using namespace mergeme::blocks;

// Calls step(bits, first index, n) for one block after another of the magnitude bits.
template <typename Step>
MERGEME_INLINE void for_each_block(const Stretch& s, const Step& step) {
  dispatch_floating(s.dtype, [&]<typename T>() {
    using Acc = acc_t<T>;
    alignas(64) Acc base[kBlock];
    alignas(64) magnitude_t<Acc> buffer[kBlock];
    alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
    magnitude_t<Acc>* __restrict bits = buffer;
    for (int64_t i = s.begin; i < s.end; i += kBlock) {
      const int n = s.end - i < kBlock ? int(s.end - i) : kBlock;
      const T* from = static_cast<const T*>(s.tensor);
      prefetch(static_cast<const T*>(s.base), i + n, s.limit);
      prefetch(from, i + n, s.limit);
      widen(static_cast<const T*>(s.base) + i, base, n);
      const loop_t<T>* __restrict tensor = loadable(from + i, widened, n);
      for (int j = 0; j < n; ++j) bits[j] = magnitude_bits(to_acc(tensor[j]) - base[j]);
      step(buffer, i, n);
    }
  });
}

template <typename Bits>
MERGEME_INLINE int count_block(const Bits* __restrict bits, int n, int known, Bits prefix) {
  Bits count = 0;
  for (int j = 0; j < n; ++j) count += (bits[j] >> known) == prefix ? 1 : 0;
  return int(count);
}

// Writes the places of the bits in [low, high], in order, and returns their number; counts those
// above.
inline constexpr int kSlack = 16;  // entries past the last that may be overwritten
template <typename Bits>
MERGEME_INLINE int places_between(const Bits* __restrict bits, int n, Bits low, Bits high,
                                  uint32_t* __restrict places, int& above) {
  int count = 0, greater = 0, j = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Bits) == 4) {  // what the compiler does not find: compressed stores
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i from = _mm512_set1_epi32(int(low)), to = _mm512_set1_epi32(int(high));
    for (; j + 16 <= n; j += 16) {
      const __m512i b = _mm512_loadu_si512(bits + j);
      const __mmask16 over = _mm512_cmpgt_epu32_mask(b, to);
      const __mmask16 in = _mm512_cmpge_epu32_mask(b, from) & ~over;
      _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(in, place));
      count += __builtin_popcount(in);
      greater += __builtin_popcount(over);
      place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
  }
#endif
  for (int k = j; k < n; ++k) greater += bits[k] > high ? 1 : 0;
  const Bits width = high - low;
  for (; j < n; ++j) {  // one comparison and no branch: which way it goes is hard to foretell
    places[count] = uint32_t(j);
    count += Bits(bits[j] - low) <= width;
  }
  above = greater;
  return count;
}

}  // namespace

void count_digits(const Stretch& s, int known, uint64_t prefix, int digit_bits, uint32_t* counts) {
  const int shift = known - digit_bits;
  const uint32_t mask = (1u << digit_bits) - 1;
  for_each_block(s, [&]<typename Bits>(const Bits* bits, int64_t, int n) {
    const bool all = known == int(sizeof(Bits)) * 8 - 1;  // the first digit: everything belongs
    if (!all && count_block(bits, n, known, Bits(prefix)) == 0) return;
    for (int j = 0; j < n; ++j)
      if (all || (bits[j] >> known) == prefix) ++counts[uint32_t(bits[j] >> shift) & mask];
  });
}

int64_t count_members(const Stretch& s, int known, uint64_t prefix) {
  int64_t count = 0;
  for_each_block(s, [&]<typename Bits>(const Bits* bits, int64_t, int n) {
    count += count_block(bits, n, known, Bits(prefix));
  });
  return count;
}

int64_t collect(const Stretch& s, uint64_t low, uint64_t high, Member* out, int64_t* above) {
  int64_t found = 0;
  for_each_block(s, [&]<typename Bits>(const Bits* bits, int64_t first, int n) {
    uint32_t places[kBlock + kSlack];
    int greater = 0;
    const int count = places_between(bits, n, Bits(low), Bits(high), places, greater);
    for (int j = 0; j < count; ++j) out[found + j] = {uint64_t{bits[places[j]]}, first + places[j]};
    found += count;
    *above += greater;
  });
  return found;
}

}  // namespace mergeme::magnitude_threshold::MERGEME_ISA
