#include "csrc/ops/weighted_sum/cpu_loops.h"

#include "csrc/common/cpu_blocks.h"

namespace mergeme::weighted_sum::MERGEME_ISA {
namespace {

using namespace mergeme::blocks;

template <typename T>
void sum_blocks(const Params& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  alignas(64) Acc buffer[kBlock];
  alignas(64) float widened[sizeof(T) == sizeof(loop_t<T>) ? 1 : kBlock];
  Acc* __restrict sum = buffer;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? int(end - i) : kBlock;
    memset(sum, 0, sizeof(buffer));
    for (int64_t m = 0; m < p.num_models; ++m) {
      const Acc weight = static_cast<Acc>(p.weights[m]);
      const T* from = static_cast<const T*>(p.tensors[m]);
      prefetch(from, i + n, end);
      const loop_t<T>* __restrict tensor = loadable(from + i, widened, n);
      for (int j = 0; j < n; ++j) sum[j] += weight * to_acc(tensor[j]);
    }
    narrow(sum, static_cast<T*>(p.out) + i, n);
  }
}

}  // namespace

void sum_range(const Params& p, int64_t begin, int64_t end) {
  dispatch_floating(p.dtype, [&]<typename T>() { sum_blocks<T>(p, begin, end); });
}

}  // namespace mergeme::weighted_sum::MERGEME_ISA
