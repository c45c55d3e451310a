#include "csrc/ops/grouped_experts/cpu_loops.h"

#include "csrc/common/cpu_vector.h"

namespace mergeme::grouped_experts {
namespace {

template <typename T>
void combine_tokens(const CombineTask& task, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Acc* rows = static_cast<const Acc*>(task.rows);
  for (int64_t t = begin; t < end; ++t) {
    const Acc* weights =
        task.weights ? static_cast<const Acc*>(task.weights) + t * task.top_k : nullptr;
    const int32_t* inverse = task.inverse + t * task.top_k;
    T* out = static_cast<T*>(task.out) + t * task.hidden;
    for_vectors<Acc>(task.hidden, [&](int64_t h, int64_t some) __attribute__((always_inline)) {
      vector_t<Acc> sum = {};
      for (int64_t k = 0; k < task.top_k; ++k) {
        if (inverse[k] >= task.num_rows) continue;
        const auto value = load_first(rows + int64_t{inverse[k]} * task.hidden + h, some);
        sum = weights ? fma(broadcast(weights[k]), value, sum) : sum + value;
      }
      store_first(out + h, sum, some);
    });
  }
}

}  // namespace

namespace MERGEME_ISA {

void combine(const CombineTask& task, int64_t begin, int64_t end) {
  dispatch_floating(task.dtype, [&]<typename T>() { combine_tokens<T>(task, begin, end); });
}

}  // namespace MERGEME_ISA
}  // namespace mergeme::grouped_experts
