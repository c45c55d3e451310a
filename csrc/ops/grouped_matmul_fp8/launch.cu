#include "csrc/ops/grouped_matmul_fp8/kernel_sm90.cuh"

namespace mergeme::grouped_matmul_fp8 {
namespace {

constexpr const char* kName = "grouped_matmul_fp8";

void plan(const Params& p, int64_t height, void* stream) {
  grouped::launch_plan({.plan = p.plan,
                        .expert_offsets = p.expert_offsets,
                        .num_rows = p.num_rows,
                        .num_experts = p.num_experts,
                        .height = height,
                        .list_rest = true},
                       stream);
}

template <typename Out>
void launch_portable(Params p, void* stream) {
  using grouped::kTile;
  plan(p, kTile, stream);
  p.grid = grouped::row_grid(kName, p.num_rows, p.num_experts, kTile, p.columns, kTile);
  grouped::launch_tiles<grouped_matmul_fp8_kernel<Out>>(
      kName,
      {.block = grouped::kTileThreads,
       .shared_bytes = sizeof(grouped::TileShared<float>),
       .stream = stream},
      p);
}

template <typename Out>
void launch_sm90(Params p, void* stream) {
  using grouped::sm90::map_of;
  using simt::Run;
  using Shape = grouped::sm90::Scaled;
  using T = float8_e4m3_t;
  const char* name = "grouped_matmul_fp8 (sm_90)";
  plan(p, Shape::kHeight, stream);
  p.grid = grouped::row_grid(kName, p.num_rows, p.num_experts, Shape::kHeight, p.columns,
                             Shape::kColumns);
  grouped::launch_tiles<grouped_matmul_fp8_sm90_kernel<Out>>(
      name, grouped::sm90::config<Shape>(stream),
      grouped::sm90::WithMaps<Params>{
          p, map_of<T>(name, p.a, 1, p.num_rows, p.depth, Run::kDepth, Shape::kRows),
          map_of<T>(name, p.b, p.num_experts, p.columns, p.depth, Run::kDepth, Shape::kColumns)});
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.columns == 0 || p.num_rows == 0) return;
  dispatch_floating(p.dtype, [&]<typename Out>() {
    if constexpr (sizeof(Out) <= 4) {
      if (simt::has_wgmma() && fits_sm90<Out>(p)) return launch_sm90<Out>(p, stream);
      launch_portable<Out>(p, stream);
    }
  });
}

}  // namespace mergeme::grouped_matmul_fp8
