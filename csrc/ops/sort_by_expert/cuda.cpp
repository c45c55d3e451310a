#include "csrc/ops/sort_by_expert/checks.h"
#include "csrc/ops/sort_by_expert/params.h"

namespace mergeme::sort_by_expert {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_device(const at::Tensor& topk_ids,
                                                          int64_t num_experts,
                                                          const std::optional<at::Tensor>& priority,
                                                          bool sentinel,
                                                          std::optional<int64_t> capacity) {
  check(topk_ids, num_experts, capacity, priority);
  const DeviceScope device(topk_ids);
  const at::Tensor ids = topk_ids.contiguous();
  const int64_t num_slots = ids.numel(), chunk = chunk_size(num_slots, num_experts);
  const int64_t num_chunks = count_chunks(num_slots, chunk);
  const at::Tensor offsets = at::empty({num_experts + 1}, ids.options());
  const at::Tensor permutation = at::empty({num_slots}, ids.options());
  const at::Tensor inverse = at::empty({num_slots}, ids.options());
  const at::Tensor counts = at::empty({(num_experts + 1) * num_chunks}, ids.options());
  const auto sort = [&](const at::Tensor& buckets, int64_t num_buckets) {
    launch({.ids = buckets.const_data_ptr<int32_t>(),
            .offsets = offsets.mutable_data_ptr<int32_t>(),
            .permutation = permutation.mutable_data_ptr<int32_t>(),
            .inverse = inverse.mutable_data_ptr<int32_t>(),
            .counts = counts.mutable_data_ptr<int32_t>(),
            .num_slots = num_slots,
            .num_experts = num_experts,
            .num_buckets = num_buckets,
            .chunk = chunk,
            .num_chunks = num_chunks},
           device.stream());
  };
  sort(ids, num_experts + sentinel);
  if (capacity) {  // whether any expert exceeds it is known on the device only
    const at::Tensor keys = priority ? priority->contiguous() : at::Tensor();
    const at::Tensor kept = at::empty_like(ids);
    launch_drop({.ids = ids.const_data_ptr<int32_t>(),
                 .offsets = offsets.const_data_ptr<int32_t>(),
                 .permutation = permutation.const_data_ptr<int32_t>(),
                 .priority = priority ? keys.const_data_ptr() : nullptr,
                 .kept_ids = kept.mutable_data_ptr<int32_t>(),
                 .num_slots = num_slots,
                 .num_experts = num_experts,
                 .capacity = *capacity,
                 .wide = priority && keys.scalar_type() == at::kDouble},
                device.stream());
    sort(kept, num_experts + 1);
  }
  return {offsets, permutation, inverse};
}

}  // namespace

MERGEME_DEVICE_IMPL(m) { m.impl("sort_by_expert", run_device); }

}  // namespace mergeme::sort_by_expert
