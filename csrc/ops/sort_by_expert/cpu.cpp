#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "csrc/ops/sort_by_expert/checks.h"

namespace mergeme::sort_by_expert {
namespace {

// Counting sort in three steps: every task counts the experts of its stretch of slots; one scan in
// the order (expert, task) turns counts into first positions; every task places its own slots in
// order. Earlier tasks hold earlier slots, so the sort is stable for any number of tasks.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_cpu(const at::Tensor& topk_ids,
                                                       int64_t num_experts) {
  check(topk_ids, num_experts);
  constexpr int64_t kGrain = 8192;  // slots that are worth a thread
  const at::Tensor ids = topk_ids.contiguous();
  const int64_t num_slots = ids.numel();
  const int64_t num_tasks =
      std::clamp<int64_t>(num_slots / std::max(kGrain, num_experts), 1, at::get_num_threads());
  const int64_t stretch = ceil_div(num_slots, num_tasks);
  const at::Tensor offsets = at::empty({num_experts + 1}, ids.options());
  const at::Tensor permutation = at::empty({num_slots}, ids.options());
  const at::Tensor inverse = at::empty({num_slots}, ids.options());
  const int32_t* expert = ids.const_data_ptr<int32_t>();
  int32_t* offset = offsets.mutable_data_ptr<int32_t>();
  int32_t* to_slot = permutation.mutable_data_ptr<int32_t>();
  int32_t* to_position = inverse.mutable_data_ptr<int32_t>();

  std::vector<int32_t> counts(num_tasks * num_experts);  // then: next free position
  std::vector<int64_t> bad(num_tasks, num_slots);        // first slot with an id out of range
  const auto for_each_task = [&](auto&& fn) {
    at::parallel_for(0, num_tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task)
        fn(task, counts.data() + task * num_experts, std::min(task * stretch, num_slots),
           std::min((task + 1) * stretch, num_slots));
    });
  };
  for_each_task([&](int64_t task, int32_t* count, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      if (expert[s] < 0 || expert[s] >= num_experts) {
        bad[task] = s;
        return;
      }
      ++count[expert[s]];
    }
  });
  const int64_t first_bad = *std::min_element(bad.begin(), bad.end());
  TORCH_CHECK_INDEX(first_bad == num_slots, kOp, ": expected topk_ids in [0, ", num_experts,
                    "), got ", expert[first_bad], " at [", first_bad / ids.size(1), ", ",
                    first_bad % ids.size(1), "]");
  int32_t position = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    offset[e] = position;
    for (int64_t task = 0; task < num_tasks; ++task) {
      int32_t& count = counts[task * num_experts + e];
      const int32_t start = position;
      position += count;
      count = start;
    }
  }
  offset[num_experts] = position;
  for_each_task([&](int64_t, int32_t* next, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int32_t at = next[expert[s]]++;
      to_slot[at] = static_cast<int32_t>(s);
      to_position[s] = at;
    }
  });
  return {offsets, permutation, inverse};
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("sort_by_expert", run_cpu); }

}  // namespace mergeme::sort_by_expert
