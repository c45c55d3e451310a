#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "csrc/common/order_key.h"
#include "csrc/ops/sort_by_expert/checks.h"

namespace mergeme::sort_by_expert {
namespace {

struct Order {
  int32_t* to_slot;      // [S]
  int32_t* to_position;  // [S]
};

// Stable counting sort of S slots by bucket in three steps: every task counts the buckets of its
// stretch of slots; one scan in the order (bucket, task) turns counts into first positions; every
// task places its own slots in order. Earlier tasks hold earlier slots, so the sort is stable for
// any number of tasks. Writes the buckets' first positions to offset [num_buckets + 1]; returns the
// first slot whose bucket is out of range, or S.
int64_t sort(const int32_t* bucket, int64_t num_slots, int64_t num_buckets, int32_t* offset,
             Order out) {
  constexpr int64_t kGrain = 8192;  // slots that are worth a thread
  const int64_t num_tasks =
      std::clamp<int64_t>(num_slots / std::max(kGrain, num_buckets), 1, at::get_num_threads());
  const int64_t stretch = ceil_div(num_slots, num_tasks);
  std::vector<int32_t> counts(num_tasks * num_buckets);  // then: next free position
  std::vector<int64_t> bad(num_tasks, num_slots);        // first slot with a bucket out of range
  const auto for_each_task = [&](auto&& fn) {
    at::parallel_for(0, num_tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task)
        fn(task, counts.data() + task * num_buckets, std::min(task * stretch, num_slots),
           std::min((task + 1) * stretch, num_slots));
    });
  };
  for_each_task([&](int64_t task, int32_t* count, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      if (bucket[s] < 0 || bucket[s] >= num_buckets) {
        bad[task] = s;
        return;
      }
      ++count[bucket[s]];
    }
  });
  const int64_t first_bad = *std::min_element(bad.begin(), bad.end());
  if (first_bad < num_slots) return first_bad;
  int32_t position = 0;
  for (int64_t b = 0; b < num_buckets; ++b) {
    offset[b] = position;
    for (int64_t task = 0; task < num_tasks; ++task) {
      int32_t& count = counts[task * num_buckets + b];
      const int32_t start = position;
      position += count;
      count = start;
    }
  }
  offset[num_buckets] = position;
  for_each_task([&](int64_t, int32_t* next, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int32_t at = next[bucket[s]]++;
      out.to_slot[at] = static_cast<int32_t>(s);
      out.to_position[s] = at;
    }
  });
  return num_slots;
}

// Puts the slots that exceed the capacity, of the sorted ones in each expert, into bucket E.
template <typename A>
void drop(const int32_t* offset, const int32_t* to_slot, int64_t num_experts, int64_t capacity,
          const A* priority, int32_t* bucket) {
  at::parallel_for(0, num_experts, 16, [&](int64_t first, int64_t last) {
    std::vector<std::pair<key_t<A>, int32_t>> members;
    for (int64_t e = first; e < last; ++e) {
      const int64_t count = offset[e + 1] - offset[e];
      if (count <= capacity) continue;
      const int32_t* slots = to_slot + offset[e];
      if (priority == nullptr) {
        for (int64_t i = capacity; i < count; ++i) bucket[slots[i]] = num_experts;
        continue;
      }
      members.clear();
      for (int64_t i = 0; i < count; ++i)
        members.emplace_back(order_key(priority[slots[i]]), slots[i]);
      std::nth_element(members.begin(), members.begin() + capacity, members.end(),
                       [](const auto& a, const auto& b) {
                         return a.first != b.first ? a.first > b.first : a.second < b.second;
                       });
      for (int64_t i = capacity; i < count; ++i) bucket[members[i].second] = num_experts;
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_cpu(const at::Tensor& topk_ids,
                                                       int64_t num_experts,
                                                       const std::optional<at::Tensor>& priority,
                                                       bool sentinel,
                                                       std::optional<int64_t> capacity) {
  check(topk_ids, num_experts, capacity, priority);
  const at::Tensor ids = topk_ids.contiguous();
  const int64_t num_slots = ids.numel(), num_buckets = num_experts + sentinel;
  const at::Tensor offsets = at::empty({num_experts + 1}, ids.options());
  const at::Tensor permutation = at::empty({num_slots}, ids.options());
  const at::Tensor inverse = at::empty({num_slots}, ids.options());
  const int32_t* expert = ids.const_data_ptr<int32_t>();
  const Order out{permutation.mutable_data_ptr<int32_t>(), inverse.mutable_data_ptr<int32_t>()};
  std::vector<int32_t> offset(num_experts + 2);

  const int64_t first_bad = sort(expert, num_slots, num_buckets, offset.data(), out);
  TORCH_CHECK_INDEX(first_bad == num_slots, kOp, ": expected topk_ids in [0, ", num_experts,
                    sentinel ? "]" : ")", ", got ", expert[first_bad], " at [",
                    first_bad / ids.size(1), ", ", first_bad % ids.size(1), "]");
  const auto exceeds = [&](int64_t e) { return offset[e + 1] - offset[e] > *capacity; };
  bool crowded = false;
  for (int64_t e = 0; capacity && e < num_experts; ++e) crowded |= exceeds(e);
  if (crowded) {
    std::vector<int32_t> bucket(expert, expert + num_slots);
    const at::Tensor keys = priority ? priority->contiguous() : at::Tensor();
    if (priority && keys.scalar_type() == at::kDouble)
      drop(offset.data(), out.to_slot, num_experts, *capacity, keys.const_data_ptr<double>(),
           bucket.data());
    else
      drop(offset.data(), out.to_slot, num_experts, *capacity,
           priority ? keys.const_data_ptr<float>() : nullptr, bucket.data());
    sort(bucket.data(), num_slots, num_experts + 1, offset.data(), out);
  }
  std::copy_n(offset.data(), num_experts + 1, offsets.mutable_data_ptr<int32_t>());
  return {offsets, permutation, inverse};
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("sort_by_expert", run_cpu); }

}  // namespace mergeme::sort_by_expert
