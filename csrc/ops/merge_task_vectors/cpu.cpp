#include "csrc/ops/merge_task_vectors/checks.h"
#include "csrc/ops/merge_task_vectors/cpu_loops.h"

namespace mergeme::merge_task_vectors {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread is worth waking for

at::Tensor run_cpu(const at::Tensor& base, at::TensorList tensors, const at::Tensor& weights,
                   const at::Tensor& scales, const at::Tensor& selection, std::string_view mask,
                   int64_t key, int64_t offset, std::string_view elect, bool normalize,
                   double lam) {
  const Mask kind = mask_of(kOp, mask);
  check(base, tensors, weights, scales, selection, kind, offset);
  const Elect elected = elect_of(elect);
  const at::Tensor from = base.contiguous();
  const at::Tensor out = at::empty_like(from);
  const HostModels models(tensors);
  const at::Tensor w = weights.contiguous(), s = scales.contiguous(), sel = selection.contiguous();
  const auto num_models = int64_t(tensors.size());
  const double* at_w = w.const_data_ptr<double>();
  double total = 0;
  for (int64_t m = 0; m < num_models; ++m) total += at_w[m];
  Params p{.out = out.mutable_data_ptr(),
           .base = from.const_data_ptr(),
           .tensors = models.pointers(),
           .weights = at_w,
           .scales = s.const_data_ptr<double>(),
           .selection = sel.const_data_ptr<double>(),
           .terms = nullptr,
           .total = &total,
           .num_models = num_models,
           .numel = from.numel(),
           .offset = offset,
           .key = static_cast<uint64_t>(key),
           .lam = lam,
           .mask = kind,
           .elect = elected,
           .normalize = normalize,
           .aligned = false,
           .dtype = dtype_of(base)};
  check_probabilities(kOp, kind, p.selection, num_models);
  const auto run = [&](auto terms) {
    p.terms = terms.data();
    at::parallel_for(0, p.numel, kGrain, [&](int64_t begin, int64_t end) {
      MERGEME_CALL_LOOPS(merge_range, p, begin, end);
    });
  };
  if (p.dtype == DType::kFloat64)
    run(make_terms<double>(models, num_models, kind, p.weights, p.scales, p.selection));
  else
    run(make_terms<float>(models, num_models, kind, p.weights, p.scales, p.selection));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("merge_task_vectors", run_cpu); }

}  // namespace mergeme::merge_task_vectors
