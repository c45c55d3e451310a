#include "csrc/ops/combine_rows/checks.h"
#include "csrc/ops/combine_rows/cpu_loops.h"

namespace mergeme::combine_rows {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread is worth waking for

at::Tensor run_cpu(const std::optional<at::Tensor>& base, at::TensorList tensors,
                   const at::Tensor& weights, std::string_view axis, int64_t offset,
                   int64_t row_length) {
  const Axis kind = check(base, tensors, weights, axis, offset, row_length);
  const at::Tensor out = at::empty_like(tensors[0], at::MemoryFormat::Contiguous);
  const at::Tensor from = base ? base->contiguous() : at::Tensor();
  const HostModels models(tensors);
  const at::Tensor w = weights.contiguous();
  const DType dtype = dtype_of(out);
  const Params p{.out = out.mutable_data_ptr(),
                 .base = base ? from.const_data_ptr() : nullptr,
                 .tensors = models.pointers(),
                 .weights = w.const_data_ptr<double>(),
                 .num_models = w.size(1),
                 .numel = out.numel(),
                 .offset = offset,
                 .row_length = row_length,
                 .aligned = false,
                 .axis = kind,
                 .dtype = dtype};
  at::Tensor by_model;
  if (kind == Axis::kColumn)
    by_model = w.t().to(dtype == DType::kFloat64 ? at::kDouble : at::kFloat).contiguous();
  const void* columns = by_model.defined() ? by_model.const_data_ptr() : nullptr;
  at::parallel_for(0, p.numel, kGrain, [&](int64_t begin, int64_t end) {
    MERGEME_CALL_LOOPS(combine_range, p, columns, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("combine_rows", run_cpu); }

}  // namespace mergeme::combine_rows
