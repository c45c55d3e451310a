#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "csrc/ops/router_statistics/checks.h"
#include "csrc/ops/router_statistics/cpu_loops.h"

namespace mergeme::router_statistics {
namespace {

constexpr int64_t kGrain = 16384;  // logits that are worth a thread

// Adds to counts the ids of tokens that count.
void count(const Params& p) {
  std::fill_n(p.counts, p.num_experts, 0);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const bool counts = p.mask == nullptr || p.mask[t];
    for (int64_t k = 0; k < p.top_k; ++k) {
      const int32_t id = p.ids[t * p.top_k + k];
      TORCH_CHECK_INDEX(id >= 0 && id < p.num_experts, kOp, ": expected topk_ids in [0, ",
                        p.num_experts, "), got ", id, " at [", t, ", ", k, "]");
      p.counts[id] += counts;
    }
  }
}

template <typename A>
void finish(const Params& p) {
  const A* partials = static_cast<const A*>(p.partials);
  A* sums = static_cast<A*>(p.sums);
  A square = 0;
  std::fill_n(sums, p.num_experts, A(0));
  for (int64_t c = 0; c < p.num_chunks; ++c) {
    const A* chunk = partials + c * (p.num_experts + 1);
    for (int64_t e = 0; e < p.num_experts; ++e) sums[e] += chunk[e];
    square += chunk[p.num_experts];
  }
  *static_cast<A*>(p.squares) = square;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_cpu(const at::Tensor& logits,
                                                       const at::Tensor& topk_ids,
                                                       const std::optional<at::Tensor>& mask) {
  check(logits, topk_ids, mask);
  const at::Tensor z = logits.contiguous(), ids = topk_ids.contiguous();
  const at::Tensor m = mask ? mask->contiguous() : at::Tensor();
  const int64_t num_experts = z.size(1), chunk = chunk_size(z.size(0));
  const int64_t num_chunks = ceil_div(z.size(0), chunk);
  const auto options = z.options().dtype(sum_type(z));
  const at::Tensor counts = at::empty({num_experts}, z.options().dtype(at::kInt));
  const at::Tensor sums = at::empty({num_experts}, options);
  const at::Tensor squares = at::empty({}, options);
  const at::Tensor partials = at::empty({num_chunks, num_experts + 1}, options);
  const Params p{.logits = z.const_data_ptr(),
                 .ids = ids.const_data_ptr<int32_t>(),
                 .mask = mask ? m.const_data_ptr<bool>() : nullptr,
                 .counts = counts.mutable_data_ptr<int32_t>(),
                 .sums = sums.mutable_data_ptr(),
                 .squares = squares.mutable_data_ptr(),
                 .partials = partials.mutable_data_ptr(),
                 .num_tokens = z.size(0),
                 .num_experts = num_experts,
                 .top_k = ids.size(1),
                 .chunk = chunk,
                 .num_chunks = num_chunks,
                 .dtype = dtype_of(z)};
  count(p);
  at::parallel_for(0, num_chunks, std::max<int64_t>(1, kGrain / (num_experts * chunk)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<double> room(row_room(num_experts));
                     MERGEME_CALL_LOOPS(sum_chunks, p, begin, end, room.data());
                   });
  p.dtype == DType::kFloat64 ? finish<double>(p) : finish<float>(p);
  return {counts, sums, squares};
}

at::Tensor run_cpu_backward(const at::Tensor& grad_sums, const at::Tensor& grad_squares,
                            const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  check_backward(grad_sums, grad_squares, logits, mask);
  const at::Tensor g = grad_sums.contiguous(), z = logits.contiguous();
  const at::Tensor m = mask ? mask->contiguous() : at::Tensor();
  const at::Tensor out = at::empty(z.sizes(), z.options());
  const BackwardParams p{.grad_sums = g.const_data_ptr(),
                         .grad_squares = grad_squares.const_data_ptr(),
                         .logits = z.const_data_ptr(),
                         .mask = mask ? m.const_data_ptr<bool>() : nullptr,
                         .grad_logits = out.mutable_data_ptr(),
                         .num_tokens = z.size(0),
                         .num_experts = z.size(1),
                         .dtype = dtype_of(z)};
  at::parallel_for(0, p.num_tokens, std::max<int64_t>(1, kGrain / p.num_experts),
                   [&](int64_t begin, int64_t end) {
                     std::vector<double> room(row_room(p.num_experts));
                     MERGEME_CALL_LOOPS(backward, p, begin, end, room.data());
                   });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) {
  m.impl("router_statistics", run_cpu);
  m.impl("router_statistics_backward", run_cpu_backward);
}

}  // namespace mergeme::router_statistics
