#include "csrc/ops/grouped_matmul_fp8/kernel.cuh"

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

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.columns == 0 || p.num_rows == 0) return;
  dispatch_floating(p.dtype, [&]<typename Out>() {
    if constexpr (sizeof(Out) <= 4) launch_portable<Out>(p, stream);
  });
}

}  // namespace mergeme::grouped_matmul_fp8
