#include <algorithm>
#include <atomic>

#include "csrc/ops/first_nonfinite/checks.h"
#include "csrc/ops/first_nonfinite/cpu_loops.h"

namespace mergeme::first_nonfinite {
namespace {

constexpr int64_t kGrain = 1 << 17;  // elements a thread is worth waking for
constexpr int64_t kStep = 1 << 15;   // elements after which it looks whether others found one

at::Tensor run_cpu(const at::Tensor& tensor) {
  check(tensor);
  const at::Tensor from = tensor.contiguous();
  const at::Tensor out = at::empty({}, tensor.options().dtype(at::kLong));
  const void* data = from.const_data_ptr();
  const DType dtype = dtype_of(tensor);
  std::atomic<int64_t> first{kNone};
  at::parallel_for(0, from.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && i < first.load(std::memory_order_relaxed); i += kStep) {
      const int64_t found = MERGEME_CALL_LOOPS(find, data, dtype, i, std::min(i + kStep, end));
      if (found == kNone) continue;
      int64_t seen = first.load();
      while (found < seen && !first.compare_exchange_weak(seen, found)) {
      }
      return;
    }
  });
  *out.mutable_data_ptr<int64_t>() = first == kNone ? -1 : first.load();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("first_nonfinite", run_cpu); }

}  // namespace mergeme::first_nonfinite
