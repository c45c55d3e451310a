#include "csrc/ops/sort_by_expert/checks.h"
#include "csrc/ops/sort_by_expert/params.h"

namespace mergeme::sort_by_expert {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_device(const at::Tensor& topk_ids,
                                                          int64_t num_experts) {
  check(topk_ids, num_experts);
  const DeviceScope device(topk_ids);
  const at::Tensor ids = topk_ids.contiguous();
  const int64_t num_slots = ids.numel(), chunk = chunk_size(num_slots, num_experts);
  const int64_t num_chunks = count_chunks(num_slots, chunk);
  const at::Tensor offsets = at::empty({num_experts + 1}, ids.options());
  const at::Tensor permutation = at::empty({num_slots}, ids.options());
  const at::Tensor inverse = at::empty({num_slots}, ids.options());
  const at::Tensor counts = at::empty({num_experts * num_chunks}, ids.options());
  launch({.ids = ids.const_data_ptr<int32_t>(),
          .offsets = offsets.mutable_data_ptr<int32_t>(),
          .permutation = permutation.mutable_data_ptr<int32_t>(),
          .inverse = inverse.mutable_data_ptr<int32_t>(),
          .counts = counts.mutable_data_ptr<int32_t>(),
          .num_slots = num_slots,
          .num_experts = num_experts,
          .chunk = chunk,
          .num_chunks = num_chunks},
         device.stream());
  return {offsets, permutation, inverse};
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("sort_by_expert", run_device); }

}  // namespace mergeme::sort_by_expert
