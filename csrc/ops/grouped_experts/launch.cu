#include <algorithm>

#include "csrc/ops/grouped_experts/kernel_sm80.cuh"

namespace mergeme::grouped_experts {
namespace {

using grouped::kTile;
using grouped::sm80::kColumns;

constexpr const char* kName = "grouped_experts";

// The same with its grid of tiles over planned rows and `columns`.
template <typename P>
P with_row_grid(P p, const Common& c, int64_t height, int64_t columns, int64_t width) {
  p.grid = grouped::row_grid(kName, c.num_slots(), c.num_experts, height, columns, width);
  return p;
}
// The same with its grid of tiles over all experts' matrices.
SumsParams with_sum_grid(SumsParams p, int64_t height, int64_t width) {
  p.grid = grouped::sum_grid(kName, p.num_experts, p.n1, height, p.n2, width);
  return p;
}

void plan(const Common& p, int64_t height, bool list_rest, void* stream) {
  grouped::launch_plan({.plan = p.plan,
                        .tokens = p.tokens,
                        .expert_offsets = p.expert_offsets,
                        .permutation = p.permutation,
                        .inverse = p.inverse,
                        .num_rows = p.num_slots(),
                        .num_experts = p.num_experts,
                        .top_k = p.top_k,
                        .height = height,
                        .list_rest = list_rest},
                       stream);
}

// Launch configurations of the two families.
simt::LaunchConfig portable(size_t shared_bytes, void* stream) {
  return {.block = grouped::kTileThreads,
          .shared_bytes = shared_bytes,
          .stream = stream,
          .overlaps = true};
}
// Of kernels that gather rows, and then keep their sums in the operands' place.
template <typename T>
constexpr size_t kGatherBytes =
    std::max<size_t>(sizeof(GatherShared<T>), OwnSums<acc_t<T>>::kBytes);
template <int kRows>
simt::LaunchConfig sm80(void* stream) {
  return {.block = grouped::sm80::kThreads,
          .shared_bytes = grouped::sm80::Shape<kRows>::kSharedBytes,
          .stream = stream,
          .overlaps = true};
}

// Calls fn.template operator()<kRows>() with the height of the tensor-core tiles to use, or 0 where
// only the portable kernels can.
template <typename T, typename F>
void dispatch_family(const Common& p, bool fits, F&& fn) {
  if constexpr (sizeof(T) == 2) {
    if (fits && simt::compute_capability() >= 80)
      return grouped::sm80::dispatch_height(p.num_slots(), p.num_experts, fn);
  }
  fn.template operator()<0>();
}

template <typename T, int kRows, bool kNt>
void launch_rows(const char* name, const Common& p, const RowsParams& rows, void* stream) {
  if constexpr (kRows > 0)
    grouped::launch_tiles<rows_sm80_kernel<T, kNt, kRows>>(
        name, sm80<kRows>(stream), with_row_grid(rows, p, kRows, rows.n, kColumns));
  else
    grouped::launch_tiles<rows_kernel<T, kNt>>(
        name, portable(sizeof(grouped::TileShared<acc_t<T>>), stream),
        with_row_grid(rows, p, kTile, rows.n, kTile));
}

template <typename T, int kRows, bool kGatherA>
void launch_sums(const char* name, const SumsParams& sums, void* stream) {
  if (sums.n1 == 0 || sums.n2 == 0) return;
  if constexpr (kRows > 0)
    grouped::launch_tiles<sums_sm80_kernel<T, kGatherA>>(name, sm80<128>(stream),
                                                         with_sum_grid(sums, 128, kColumns));
  else
    grouped::launch_tiles<sums_kernel<T, kGatherA>>(
        name, portable(sizeof(grouped::TileShared<acc_t<T>>), stream),
        with_sum_grid(sums, kTile, kTile));
}

template <typename T, int kWidth>
void launch_combine(const CombineParams& p, void* stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;  // each block loops over tokens
  simt::launch("grouped_experts (combine)",
               {.grid = static_cast<unsigned>(std::min(p.num_tokens, kMaxBlocks)),
                .block = kCombineThreads,
                .stream = stream,
                .overlaps = true},
               combine_kernel<T, kWidth>, p);
}

// The weighted sum of each token's rows, or without weights.
template <typename T>
void combine(const Common& c, void* out, const void* rows, const void* weights, void* stream) {
  const CombineParams p{.out = out,
                        .rows = rows,
                        .weights = weights,
                        .expert_offsets = c.expert_offsets,
                        .inverse = c.inverse,
                        .num_tokens = c.num_tokens,
                        .top_k = c.top_k,
                        .num_experts = c.num_experts,
                        .hidden = c.hidden};
  constexpr int kWidth = 16 / sizeof(acc_t<T>);
  if (c.hidden % kWidth == 0 && is_aligned(out) && is_aligned(rows))
    launch_combine<T, kWidth>(p, stream);
  else
    launch_combine<T, 1>(p, stream);
}

template <typename T, int kRows>
void launch_forward(const Params& p, void* stream) {
  plan(p, kRows > 0 ? kRows : kTile, p.preactivation != nullptr, stream);
  if (p.intermediate > 0) {
    if constexpr (kRows > 0)
      grouped::launch_tiles<gate_up_sm80_kernel<T, kRows>>(
          "grouped_experts (gate_up, sm_80)", sm80<kRows>(stream),
          with_row_grid(p, p, kRows, p.intermediate, kGateUpWidth));
    else
      grouped::launch_tiles<gate_up_kernel<T>>(
          "grouped_experts (gate_up)", portable(kGatherBytes<T>, stream),
          with_row_grid(p, p, kTile, p.intermediate, kTile / 2));
  }
  if (p.hidden == 0) return;
  launch_rows<T, kRows, true>("grouped_experts (down)", p,
                              {.a = p.activation,
                               .b = p.down,
                               .out = p.expert_out,
                               .plan = p.plan,
                               .k = p.intermediate,
                               .n = p.hidden,
                               .num_experts = p.num_experts},
                              stream);
}

template <typename T, int kRows>
void launch_gradients(const BackwardParams& p, void* stream) {
  plan(p, kRows > 0 ? kRows : kTile, false, stream);
  if (p.intermediate > 0) {
    if constexpr (kRows > 0)
      grouped::launch_tiles<grad_activation_sm80_kernel<T, kRows>>(
          "grouped_experts (grad activation, sm_80)", sm80<kRows>(stream),
          with_row_grid(p, p, kRows, p.intermediate, kColumns));
    else
      grouped::launch_tiles<grad_activation_kernel<T>>(
          "grouped_experts (grad activation)", portable(kGatherBytes<T>, stream),
          with_row_grid(p, p, kTile, p.intermediate, kTile));
  }
  if (p.grad_down != nullptr)
    launch_sums<T, kRows, true>("grouped_experts (grad down)",
                                {.a = p.grad,
                                 .b = p.weighted,
                                 .out = p.grad_down,
                                 .expert_offsets = p.expert_offsets,
                                 .tokens = p.tokens,
                                 .n1 = p.hidden,
                                 .n2 = p.intermediate,
                                 .num_experts = p.num_experts},
                                stream);
  if (p.grad_gate_up != nullptr)
    launch_sums<T, kRows, false>("grouped_experts (grad gate_up)",
                                 {.a = p.grad_preactivation,
                                  .b = p.x,
                                  .out = p.grad_gate_up,
                                  .expert_offsets = p.expert_offsets,
                                  .tokens = p.tokens,
                                  .n1 = 2 * p.intermediate,
                                  .n2 = p.hidden,
                                  .num_experts = p.num_experts},
                                 stream);
  if (p.grad_x != nullptr && p.hidden > 0 && p.num_slots() > 0)
    launch_rows<T, kRows, false>("grouped_experts (grad rows)", p,
                                 {.a = p.grad_preactivation,
                                  .b = p.gate_up,
                                  .out = p.grad_rows,
                                  .plan = p.plan,
                                  .k = 2 * p.intermediate,
                                  .n = p.hidden,
                                  .num_experts = p.num_experts},
                                 stream);
  if (p.grad_weights != nullptr && p.num_slots() > 0)
    simt::launch("grouped_experts (grad weights)",
                 {.grid = static_cast<unsigned>(
                      std::min<int64_t>(ceil_div(p.num_slots(), kWeightsThreads), 4096)),
                  .block = kWeightsThreads,
                  .stream = stream},
                 grad_weights_kernel<acc_t<T>>,
                 WeightsParams{.grad_weights = p.grad_weights,
                               .weight_parts = p.weight_parts,
                               .expert_offsets = p.expert_offsets,
                               .inverse = p.inverse,
                               .num_slots = p.num_slots(),
                               .num_experts = p.num_experts,
                               .parts = ceil_div(p.intermediate, kRows > 0 ? kColumns : kTile)});
}

}  // namespace

void launch(const Params& p, void* stream) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    if (p.num_slots() > 0)
      dispatch_family<T>(p, fits_sm80(p),
                         [&]<int kRows>() { launch_forward<T, kRows>(p, stream); });
    if (p.num_tokens > 0 && p.hidden > 0)
      combine<T>(p, p.out, p.expert_out, p.topk_weights, stream);
  });
}

void launch_backward(const BackwardParams& p, void* stream) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    dispatch_family<T>(p, fits_sm80(p) && is_aligned(p.grad) && is_aligned(p.preactivation),
                       [&]<int kRows>() { launch_gradients<T, kRows>(p, stream); });
    if (p.grad_x != nullptr && p.num_tokens > 0 && p.hidden > 0)
      combine<T>(p, p.grad_x, p.grad_rows, nullptr, stream);
  });
}

}  // namespace mergeme::grouped_experts
