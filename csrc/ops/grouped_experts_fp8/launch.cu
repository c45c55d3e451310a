#include <algorithm>

#include "csrc/ops/grouped_experts_fp8/kernel_sm90.cuh"
#include "csrc/ops/grouped_matmul_fp8/params.h"
#include "csrc/ops/quantize_fp8/params.h"

namespace mergeme::grouped_experts_fp8 {
namespace {

constexpr const char* kName = "grouped_experts_fp8";

void plan(const Params& p, int64_t height, void* stream) {
  grouped::launch_plan({.plan = p.plan,
                        .tokens = p.tokens,
                        .expert_offsets = p.expert_offsets,
                        .permutation = p.permutation,
                        .inverse = p.inverse,
                        .num_rows = p.num_slots(),
                        .num_experts = p.num_experts,
                        .top_k = p.top_k,
                        .height = height,
                        .list_rest = true},
                       stream);
}

void launch_gate_up_sm90(Params p, void* stream) {
  using Shape = grouped::sm90::Scaled;
  constexpr int kWidth = Shape::kColumns / 2;
  const char* name = "grouped_experts_fp8 (gate_up, sm_90)";
  plan(p, Shape::kHeight, stream);
  p.grid = grouped::row_grid(kName, p.num_slots(), p.num_experts, Shape::kHeight, p.intermediate,
                             kWidth);
  grouped::launch_tiles<gate_up_fp8_sm90_kernel>(
      name, grouped::sm90::config<Shape>(stream),
      grouped::sm90::WithMaps<Params>{
          p,
          {},
          grouped::sm90::map_of<float8_e4m3_t>(name, p.gate_up, p.num_experts, 2 * p.intermediate,
                                               p.hidden, simt::Run::kDepth, kWidth)});
}

void launch_gate_up(const Params& given, void* stream) {
  using grouped::kTile;
  if (simt::has_wgmma() && fits_sm90(given)) return launch_gate_up_sm90(given, stream);
  Params p = given;
  plan(p, kTile, stream);
  if (p.intermediate == 0) return;
  p.grid = grouped::row_grid(kName, p.num_slots(), p.num_experts, kTile, p.intermediate, kTile / 2);
  constexpr size_t kBytes =
      std::max<size_t>(sizeof(GatherShared), grouped_experts::OwnSums<float>::kBytes);
  grouped::launch_tiles<gate_up_fp8_kernel>(
      "grouped_experts_fp8 (gate_up)",
      {.block = grouped::kTileThreads, .shared_bytes = kBytes, .stream = stream}, p);
}

void launch_experts(const Params& p, void* stream) {
  const int64_t h = p.hidden, i = p.intermediate;
  quantize_fp8::launch({.q = p.quantized,
                        .scale = p.quantized_scale,
                        .x = p.x,
                        .num_rows = p.num_tokens,
                        .columns = h,
                        .blocks = scale_blocks(h),
                        .dtype = p.dtype},
                       stream);
  launch_gate_up(p, stream);
  quantize_fp8::launch({.q = p.activation_q,
                        .scale = p.activation_scale,
                        .x = p.activation,
                        .num_rows = p.num_slots(),
                        .columns = i,
                        .blocks = scale_blocks(i),
                        .dtype = DType::kFloat32},
                       stream);
  grouped_matmul_fp8::launch({.out = p.expert_out,
                              .a = p.activation_q,
                              .a_scale = p.activation_scale,
                              .b = p.down,
                              .b_scale = p.down_scale,
                              .expert_offsets = p.expert_offsets,
                              .plan = p.plan,
                              .num_rows = p.num_slots(),
                              .num_experts = p.num_experts,
                              .depth = i,
                              .columns = h,
                              .dtype = DType::kFloat32},
                             stream);
}

template <typename T, int kWidth>
void launch_combine(const Params& p, void* stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;  // each block loops over tokens
  simt::launch("grouped_experts_fp8 (combine)",
               {.grid = static_cast<unsigned>(std::min(p.num_tokens, kMaxBlocks)),
                .block = grouped_experts::kCombineThreads,
                .stream = stream},
               grouped_experts::combine_kernel<T, kWidth>,
               grouped_experts::CombineParams{.out = p.out,
                                              .rows = p.expert_out,
                                              .weights = p.topk_weights,
                                              .expert_offsets = p.expert_offsets,
                                              .inverse = p.inverse,
                                              .num_tokens = p.num_tokens,
                                              .top_k = p.top_k,
                                              .num_experts = p.num_experts,
                                              .hidden = p.hidden});
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.num_slots() > 0) launch_experts(p, stream);
  if (p.num_tokens == 0 || p.hidden == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) <= 4) {
      if (p.hidden % 4 == 0 && is_aligned(p.out) && is_aligned(p.expert_out))
        launch_combine<T, 4>(p, stream);
      else
        launch_combine<T, 1>(p, stream);
    }
  });
}

}  // namespace mergeme::grouped_experts_fp8
