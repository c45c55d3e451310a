#include "csrc/ops/weighted_sum/checks.h"
#include "csrc/ops/weighted_sum/cpu_loops.h"

namespace mergeme::weighted_sum {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread is worth waking for

at::Tensor run_cpu(at::TensorList tensors, const at::Tensor& weights) {
  check(tensors, weights);
  const at::Tensor out = at::empty_like(tensors[0], at::MemoryFormat::Contiguous);
  const HostModels models(tensors);
  const at::Tensor w = weights.contiguous();
  const Params p{.out = out.mutable_data_ptr(),
                 .tensors = models.pointers(),
                 .weights = w.const_data_ptr<double>(),
                 .num_models = w.numel(),
                 .numel = out.numel(),
                 .aligned = false,
                 .dtype = dtype_of(out)};
  at::parallel_for(0, p.numel, kGrain, [&](int64_t begin, int64_t end) {
    MERGEME_CALL_LOOPS(sum_range, p, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("weighted_sum", run_cpu); }

}  // namespace mergeme::weighted_sum
