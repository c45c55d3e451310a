#include "csrc/ops/quantize_fp8/checks.h"
#include "csrc/ops/quantize_fp8/cpu_loops.h"

namespace mergeme::quantize_fp8 {
namespace {

std::tuple<at::Tensor, at::Tensor> run_cpu(const at::Tensor& x) {
  check(x);
  const at::Tensor from = x.contiguous();
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn));
  const at::Tensor scale =
      at::empty({x.size(0), scale_blocks(x.size(1))}, x.options().dtype(at::kFloat));
  const Task task{.q = q.mutable_data_ptr(),
                  .scale = scale.mutable_data_ptr<float>(),
                  .x = from.const_data_ptr(),
                  .columns = x.size(1),
                  .dtype = dtype_of(x),
                  .widened = false};
  at::parallel_for(0, x.size(0), grain(x.size(1)),
                   [&](int64_t begin, int64_t end) { quantize(task, begin, end); });
  return {q, scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("quantize_fp8", run_cpu); }

}  // namespace mergeme::quantize_fp8
