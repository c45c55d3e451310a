#include <algorithm>

#include "csrc/ops/gram/checks.h"
#include "csrc/ops/gram/cpu_loops.h"

namespace mergeme::gram {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread is worth waking for

// out[g, i, j] = out[g, j, i] = the sum of the pair's partials, in index order.
void finish(const Params& p) {
  const int64_t pairs = num_pairs(p.num_models);
  const bool rows = p.axis == Axis::kRow;
  const int64_t of_group = rows ? p.blocks * pairs : 1, of_block = rows ? pairs : pairs * p.groups,
                of_pair = rows ? 1 : p.groups;
  at::parallel_for(0, p.groups, kGrain / pairs + 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      for (int64_t j = 0; j < p.num_models; ++j)
        for (int64_t i = 0; i <= j; ++i) {
          const double* part = p.partials + g * of_group + pair_of(i, j) * of_pair;
          double sum = 0;
          for (int64_t b = 0; b < p.blocks; ++b) sum += part[b * of_block];
          double* matrix = p.out + g * p.num_models * p.num_models;
          matrix[i * p.num_models + j] = matrix[j * p.num_models + i] = sum;
        }
  });
}

at::Tensor run_cpu(const std::optional<at::Tensor>& base, at::TensorList tensors,
                   std::string_view axis) {
  const Vectors vectors = check(base, tensors, axis);
  const at::Tensor from = base ? base->contiguous() : at::Tensor();
  const HostModels models(tensors);
  const auto num_models = int64_t(tensors.size());
  const int64_t blocks = num_blocks(vectors.axis, vectors.length);
  const auto doubles = tensors[0].options().dtype(at::kDouble);
  const at::Tensor out = at::empty({vectors.groups, num_models, num_models}, doubles);
  const at::Tensor partials = at::empty({vectors.groups * blocks * num_pairs(num_models)}, doubles);
  const Params p{.out = out.mutable_data_ptr<double>(),
                 .base = base ? from.const_data_ptr() : nullptr,
                 .tensors = models.pointers(),
                 .partials = partials.mutable_data_ptr<double>(),
                 .num_models = num_models,
                 .groups = vectors.groups,
                 .length = vectors.length,
                 .blocks = blocks,
                 .axis = vectors.axis,
                 .dtype = dtype_of(tensors[0])};
  const bool rows = p.axis == Axis::kRow;
  const int64_t units = (rows ? p.groups : ceil_div(p.groups, kTile)) * blocks;
  const int64_t unit_elements = rows ? std::min<int64_t>(p.length, kRowBlock)
                                     : kTile * std::min<int64_t>(p.length, kColumnBlock);
  at::parallel_for(
      0, units, kGrain / std::max<int64_t>(unit_elements, 1) + 1, [&](int64_t begin, int64_t end) {
        const at::Tensor scratch = at::empty({scratch_size(p)}, at::dtype(at::kDouble));
        MERGEME_CALL_LOOPS(sum_units, p, begin, end, scratch.mutable_data_ptr<double>());
      });
  finish(p);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mergeme, CPU, m) { m.impl("gram", run_cpu); }

}  // namespace mergeme::gram
