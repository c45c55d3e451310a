#include <algorithm>

#include "csrc/ops/drop_by_rank/checks.h"
#include "csrc/ops/drop_by_rank/cpu_loops.h"

namespace mergeme::drop_by_rank {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread is worth waking for

at::Tensor run_cpu(const at::Tensor& base, at::TensorList tensors, const at::Tensor& selection,
                   int64_t key, int64_t offset, bool inverse_prob) {
  check(base, tensors, selection, offset);
  const at::Tensor from = base.contiguous();
  const at::Tensor out = empty_output(base, tensors);
  const HostModels models(tensors);
  const at::Tensor sel = selection.contiguous();
  const auto num_models = int64_t(tensors.size());
  const auto* at_sel = sel.const_data_ptr<double>();
  for (int64_t i = 0; i < 2 * num_models; ++i)
    TORCH_CHECK_VALUE(at_sel[i] >= 0 && at_sel[i] <= 1, kOp,
                      ": expected selection to be keep probabilities in [0, 1], got ", at_sel[i],
                      " for model ", i / 2);
  if (from.numel() == 0) return out;
  const int64_t length = row_length(from);
  const Params p{.out = out.mutable_data_ptr(),
                 .base = from.const_data_ptr(),
                 .tensors = models.pointers(),
                 .selection = at_sel,
                 .scratch = nullptr,
                 .num_models = num_models,
                 .rows = from.numel() / length,
                 .length = length,
                 .offset = offset,
                 .key = static_cast<uint64_t>(key),
                 .inverse_prob = inverse_prob,
                 .dtype = dtype_of(base)};
  const int64_t grain = std::max<int64_t>(1, kGrain / length);
  at::parallel_for(0, num_models * p.rows, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch =
        at::empty({length * kScratchPerElement}, at::TensorOptions().dtype(at::kByte));
    MERGEME_CALL_LOOPS(drop_rows, p, begin, end, scratch.mutable_data_ptr());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("drop_by_rank", run_cpu); }

}  // namespace mergeme::drop_by_rank
