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
      widen(static_cast<const T*>(s.base) + i, base, n);
      const loop_t<T>* __restrict tensor =
          loadable(static_cast<const T*>(s.tensor) + i, widened, n);
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

int64_t collect(const Stretch& s, int known, uint64_t prefix, Member* out) {
  constexpr int kPart = 64;  // members are rare: most parts are passed over by the vectorised count
  int64_t found = 0;
  for_each_block(s, [&]<typename Bits>(const Bits* bits, int64_t first, int n) {
    for (int begin = 0; begin < n; begin += kPart) {
      const int part = n - begin < kPart ? n - begin : kPart;
      if (count_block(bits + begin, part, known, Bits(prefix)) == 0) continue;
      for (int j = begin; j < begin + part; ++j)
        if ((bits[j] >> known) == prefix) out[found++] = {uint64_t{bits[j]}, first + j};
    }
  });
  return found;
}

}  // namespace mergeme::magnitude_threshold::MERGEME_ISA
