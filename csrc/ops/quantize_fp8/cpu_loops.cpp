#include "csrc/ops/quantize_fp8/cpu_loops.h"

#include "csrc/common/cpu_vector.h"

namespace mergeme::quantize_fp8 {
namespace {

// The largest lane of positive numbers' bits.
MERGEME_INLINE float largest_lane(IntVector bits) {
  int32_t largest = 0;
  for (int i = 0; i < kLanes<float>; ++i) largest = bits[i] > largest ? bits[i] : largest;
  return float_of(uint32_t(largest));
}

template <typename T, bool kWidened>
void quantize_row(const T* x, void* q, float* scale, int64_t columns) {
  for (int64_t k = 0; k < columns; k += kScaleBlock, ++scale) {
    const int64_t count = smaller(kScaleBlock, columns - k);
    IntVector largest = {};
    for_vectors<float>(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
      const IntVector bits = reinterpret_cast<IntVector>(load_first(x + k + j, some)) & 0x7fffffff;
      const IntVector finite = bits < 0x7f800000 ? bits : IntVector{};
      largest = finite > largest ? finite : largest;
    });
    *scale = scale_of(largest_lane(largest));
    const FloatVector divisor = broadcast(*scale);
    for_vectors<float>(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
      const FloatVector value = load_first(x + k + j, some) / divisor;
      if constexpr (kWidened)
        store_first(static_cast<bfloat16_t*>(q) + k + j, decode_e4m3(encode_e4m3(value) << 24),
                    some);
      else
        store_first(static_cast<float8_e4m3_t*>(q) + k + j, value, some);
    });
  }
}

template <typename T, bool kWidened>
void quantize_some(const Task& task, int64_t begin, int64_t end) {
  const int64_t k = task.columns, blocks = scale_blocks(k);
  constexpr int64_t kBytes = kWidened ? 2 : 1;
  for (int64_t row = begin; row < end; ++row)
    quantize_row<T, kWidened>(static_cast<const T*>(task.x) + row * k,
                              static_cast<char*>(task.q) + row * k * kBytes,
                              task.scale + row * blocks, k);
}

}  // namespace

namespace MERGEME_ISA {

void quantize_rows(const Task& task, int64_t begin, int64_t end) {
  dispatch_floating(task.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) <= 4) {
      if (task.widened)
        quantize_some<T, true>(task, begin, end);
      else
        quantize_some<T, false>(task, begin, end);
    }
  });
}

void widen(const float8_e4m3_t* from, bfloat16_t* to, int64_t count) {
  for_vectors<float>(count, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
    store_first(to + j, load_first(from + j, some), some);
  });
}

}  // namespace MERGEME_ISA
}  // namespace mergeme::quantize_fp8
