#include "csrc/ops/first_nonfinite/cpu_loops.h"

#include "csrc/common/cpu_vector.h"

namespace mergeme::first_nonfinite::MERGEME_ISA {
namespace {

// What is known of an element type's bits: added to a magnitude, `kCarry` reaches the sign bit
// exactly if the exponent is all ones.
template <typename T>
struct Bits;
template <>
struct Bits<float16_t> {
  using type = uint16_t;
  static constexpr type kCarry = 0x0400;
};
template <>
struct Bits<bfloat16_t> {
  using type = uint16_t;
  static constexpr type kCarry = 0x0080;
};
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type kCarry = 0x00800000u;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type kCarry = 0x0010000000000000ull;
};

constexpr int kUnroll = 8;  // vectors tested before a branch

template <typename T>
int64_t find_in(const T* tensor, int64_t begin, int64_t end) {
  using Word = typename Bits<T>::type;
  typedef Word Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kWords = kVectorBytes / int(sizeof(Word));
  constexpr Word kSign = Word(Word(1) << (8 * sizeof(Word) - 1)), kRest = Word(kSign - 1);
  const auto reaches = [](auto x) { return (x & kRest) + Bits<T>::kCarry; };
  int64_t i = begin;
  for (; i + kUnroll * kWords <= end; i += kUnroll * kWords) {
    Vector any{};
#pragma GCC unroll 8
    for (int v = 0; v < kUnroll; ++v) {
      Vector x;
      memcpy(&x, tensor + i + v * kWords, sizeof x);
      any |= reaches(x);
    }
    any &= kSign;
    uint64_t parts[kVectorBytes / 8], all = 0;
    memcpy(parts, &any, sizeof any);
    for (const uint64_t part : parts) all |= part;
    if (all != 0) break;  // in these, or the loop below would find nothing
  }
  for (; i < end; ++i) {
    Word x;
    memcpy(&x, tensor + i, sizeof x);
    if (Word(reaches(x)) & kSign) return i;
  }
  return kNone;
}

}  // namespace

int64_t find(const void* tensor, DType dtype, int64_t begin, int64_t end) {
  int64_t first = kNone;
  dispatch_floating(
      dtype, [&]<typename T>() { first = find_in(static_cast<const T*>(tensor), begin, end); });
  return first;
}

}  // namespace mergeme::first_nonfinite::MERGEME_ISA
