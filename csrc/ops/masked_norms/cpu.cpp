#include <cmath>

#include "csrc/ops/masked_norms/checks.h"
#include "csrc/ops/masked_norms/cpu_loops.h"

namespace mergeme::masked_norms {
namespace {

constexpr int64_t kGrain = 8;  // blocks a thread is worth waking for

at::Tensor run_cpu(const at::Tensor& base, at::TensorList tensors, const at::Tensor& selection,
                   std::string_view mask, int64_t key) {
  const Mask kind = mask_of(kOp, mask);
  check(base, tensors, selection, kind);
  const at::Tensor from = base.contiguous();
  const HostModels models(tensors);
  const at::Tensor sel = selection.contiguous();
  const auto num_models = int64_t(tensors.size());
  const int64_t blocks = ceil_div(from.numel(), kSumBlock);
  const auto doubles = base.options().dtype(at::kDouble);
  const at::Tensor out = at::empty({num_models, kNorms}, doubles);
  const at::Tensor partials = at::empty({num_models, blocks, kNorms}, doubles);
  Params p{.out = out.mutable_data_ptr<double>(),
           .base = from.const_data_ptr(),
           .tensors = models.pointers(),
           .selection = sel.const_data_ptr<double>(),
           .terms = nullptr,
           .partials = partials.mutable_data_ptr<double>(),
           .num_models = num_models,
           .numel = from.numel(),
           .key = static_cast<uint64_t>(key),
           .mask = kind,
           .dtype = dtype_of(base)};
  check_probabilities(kOp, kind, p.selection, num_models);
  const auto run = [&](auto terms) {
    p.terms = terms.data();
    at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
      MERGEME_CALL_LOOPS(sum_blocks, p, begin, end);
    });
  };
  if (p.dtype == DType::kFloat64)
    run(make_terms<double>(models, num_models, kind, nullptr, nullptr, p.selection));
  else
    run(make_terms<float>(models, num_models, kind, nullptr, nullptr, p.selection));
  for (int64_t m = 0; m < num_models; ++m) {
    double* norms = p.out + m * kNorms;
    for (int s = 0; s < kNorms; ++s) norms[s] = 0;
    for (int64_t b = 0; b < blocks; ++b)
      for (int s = 0; s < kNorms; ++s) {
        const double part = p.partials[(m * blocks + b) * kNorms + s];
        norms[s] = s % 3 == 2 ? greater(norms[s], part) : norms[s] + part;
      }
    norms[1] = std::sqrt(norms[1]);
    norms[4] = std::sqrt(norms[4]);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("masked_norms", run_cpu); }

}  // namespace mergeme::masked_norms
