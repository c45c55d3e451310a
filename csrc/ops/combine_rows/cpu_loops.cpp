#include "csrc/ops/combine_rows/cpu_loops.h"

#include "csrc/common/cpu_blocks.h"

namespace mergeme::combine_rows::MERGEME_ISA {
namespace {

using namespace mergeme::blocks;

// The end of the stretch from `i` on, of a block at most, in which the weights stay the same
// (kAll, kRow) or follow each other (kColumn).
MERGEME_INLINE int64_t stretch_end(const Params& p, int64_t i, int64_t end) {
  int64_t last = end - i < kBlock ? end : i + kBlock;
  if (p.axis == Axis::kAll) return last;
  const int64_t rest = p.row_length - (p.offset + i) % p.row_length;
  return rest < last - i ? i + rest : last;
}

template <typename T, bool kBase>
void combine(const Params& p, const void* by_model, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  alignas(64) Acc buffer[kBlock], base_buffer[kBlock];
  alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
  Acc* __restrict sum = buffer;
  Acc* __restrict base = base_buffer;
  memset(base, 0, sizeof(base_buffer));
  for (int64_t i = begin, next; i < end; i = next) {
    next = stretch_end(p, i, end);
    const int n = int(next - i);
    const int64_t group = p.axis == Axis::kRow ? (p.offset + i) / p.row_length : 0;
    const int64_t column = p.axis == Axis::kColumn ? (p.offset + i) % p.row_length : 0;
    memset(sum, 0, size_t(n) * sizeof(Acc));
    if constexpr (kBase) {
      prefetch(static_cast<const T*>(p.base), next, end);
      widen(static_cast<const T*>(p.base) + i, base, n);
    }
    for (int64_t m = 0; m < p.num_models; ++m) {
      const T* from = static_cast<const T*>(p.tensors[m]);
      prefetch(from, next, end);
      const loop_t<T>* __restrict tensor = loadable(from + i, widened, n);
      const auto delta = [&](int j) {
        if constexpr (kBase) return to_acc(tensor[j]) - base[j];
        return to_acc(tensor[j]);
      };
      if (p.axis == Axis::kColumn) {
        const Acc* __restrict weights =
            static_cast<const Acc*>(by_model) + m * p.row_length + column;
        for (int j = 0; j < n; ++j) sum[j] += weights[j] * delta(j);
      } else {
        const Acc weight = static_cast<Acc>(p.weights[group * p.num_models + m]);
        for (int j = 0; j < n; ++j) sum[j] += weight * delta(j);
      }
    }
    if constexpr (kBase)
      for (int j = 0; j < n; ++j) sum[j] = base[j] + sum[j];
    narrow(sum, static_cast<T*>(p.out) + i, n);
  }
}

}  // namespace

void combine_range(const Params& p, const void* by_model, int64_t begin, int64_t end) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.base != nullptr)
      combine<T, true>(p, by_model, begin, end);
    else
      combine<T, false>(p, by_model, begin, end);
  });
}

}  // namespace mergeme::combine_rows::MERGEME_ISA
