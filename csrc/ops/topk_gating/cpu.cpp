#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "csrc/ops/topk_gating/checks.h"
#include "csrc/ops/topk_gating/cpu_loops.h"

namespace mergeme::topk_gating {
namespace {

// Rows of a task: enough work to be worth a thread.
int64_t grain(int64_t num_experts) { return std::max<int64_t>(1, 16384 / num_experts); }

std::tuple<at::Tensor, at::Tensor> run_cpu(const at::Tensor& logits,
                                           const std::optional<at::Tensor>& bias, int64_t top_k,
                                           c10::string_view score, bool renormalize, double scale,
                                           int64_t num_groups, int64_t top_groups,
                                           c10::string_view group_score) {
  const Score kind = check(logits, bias, top_k, score);
  const Groups groups = check_groups(logits.size(1), top_k, num_groups, top_groups, group_score);
  const at::Tensor z = logits.contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor ids = at::empty({z.size(0), top_k}, z.options().dtype(at::kInt));
  const at::Tensor weights = at::empty({z.size(0), top_k}, z.options().dtype(weight_type(z)));
  const Params p{.logits = z.const_data_ptr(),
                 .bias = b.defined() ? b.const_data_ptr<float>() : nullptr,
                 .ids = ids.mutable_data_ptr<int32_t>(),
                 .weights = weights.mutable_data_ptr(),
                 .num_tokens = z.size(0),
                 .num_experts = z.size(1),
                 .top_k = top_k,
                 .num_groups = groups.count,
                 .top_groups = groups.top,
                 .scale = scale,
                 .dtype = dtype_of(z),
                 .score = kind,
                 .group_score = groups.score,
                 .renormalize = renormalize};
  at::parallel_for(0, p.num_tokens, grain(p.num_experts), [&](int64_t begin, int64_t end) {
    std::vector<double> room(room_size(p));
    MERGEME_CALL_LOOPS(forward, p, begin, end, room.data());
  });
  return {ids, weights};
}

at::Tensor run_cpu_backward(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& topk_ids, c10::string_view score, bool renormalize,
                            double scale) {
  const Score kind = check_backward(grad, logits, topk_ids, score);
  const at::Tensor g = grad.contiguous(), z = logits.contiguous(), ids = topk_ids.contiguous();
  const at::Tensor out = at::empty(z.sizes(), z.options());
  if (out.numel() == 0) return out;
  const BackwardParams p{.grad = g.const_data_ptr(),
                         .logits = z.const_data_ptr(),
                         .ids = ids.const_data_ptr<int32_t>(),
                         .grad_logits = out.mutable_data_ptr(),
                         .num_tokens = z.size(0),
                         .num_experts = z.size(1),
                         .top_k = ids.size(1),
                         .scale = scale,
                         .dtype = dtype_of(z),
                         .score = kind,
                         .renormalize = renormalize};
  at::parallel_for(0, p.num_tokens, grain(p.num_experts), [&](int64_t begin, int64_t end) {
    std::vector<double> room(room_size(p));
    const int64_t bad = MERGEME_CALL_LOOPS(backward, p, begin, end, room.data());
    TORCH_CHECK_INDEX(bad < 0, kBackwardOp, ": expected topk_ids in [0, ", p.num_experts, "), got ",
                      p.ids[bad], " at [", bad / p.top_k, ", ", bad % p.top_k, "]");
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) {
  m.impl("topk_gating", run_cpu);
  m.impl("topk_gating_backward", run_cpu_backward);
}

}  // namespace mergeme::topk_gating
