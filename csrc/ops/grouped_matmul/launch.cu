#include "csrc/ops/grouped_matmul/kernel_sm90.cuh"

namespace mergeme::grouped_matmul {
namespace {

// The same with its grid of height x width tiles.
Params with_grid(Params p, int64_t height, int64_t width) {
  constexpr const char* kName = "grouped_matmul";
  p.grid =
      p.layout == Layout::kTn
          ? grouped::sum_grid(kName, p.num_experts, p.a_columns, height, p.out_columns, width)
          : grouped::row_grid(kName, p.num_tokens, p.num_experts, height, p.out_columns, width);
  return p;
}

void plan(const Params& p, int64_t height, void* stream) {
  grouped::launch_plan({.plan = p.layout == Layout::kTn ? nullptr : p.plan,
                        .expert_offsets = p.expert_offsets,
                        .num_rows = p.num_tokens,
                        .num_experts = p.num_experts,
                        .height = height,
                        .list_rest = true},
                       stream);
}

template <typename T, Layout kLayout>
void launch_portable(const Params& p, void* stream) {
  plan(p, grouped::kTile, stream);
  grouped::launch_tiles<grouped_matmul_kernel<T, kLayout>>(
      "grouped_matmul",
      {.block = grouped::kTileThreads,
       .shared_bytes = sizeof(grouped::TileShared<acc_t<T>>),
       .stream = stream,
       .overlaps = true},
      with_grid(p, grouped::kTile, grouped::kTile));
}

template <typename T, Layout kLayout, int kRows>
void launch_sm80(const Params& p, void* stream) {
  plan(p, kRows, stream);
  grouped::launch_tiles<grouped_matmul_sm80_kernel<T, kLayout, kRows>>(
      "grouped_matmul (sm_80)",
      {.block = grouped::sm80::kThreads,
       .shared_bytes = grouped::sm80::Shape<kRows>::kSharedBytes,
       .stream = stream,
       .overlaps = true},
      with_grid(p, kRows, grouped::sm80::kColumns));
}

template <typename T, Layout kLayout, typename Shape>
void launch_sm90(const Params& p, void* stream) {
  using grouped::sm90::map_of;
  using simt::Run;
  plan(p, Shape::kHeight, stream);
  const char* name = "grouped_matmul (sm_90)";
  constexpr Run kRunA = kLayout == Layout::kTn ? Run::kAcross : Run::kDepth;
  constexpr Run kRunB = kLayout == Layout::kNt ? Run::kDepth : Run::kAcross;
  const int64_t matrices = kLayout == Layout::kTn ? 1 : p.num_experts;
  const int64_t rows = kLayout == Layout::kNt   ? p.out_columns
                       : kLayout == Layout::kNn ? p.a_columns
                                                : p.num_tokens;
  const int64_t columns = kLayout == Layout::kNt ? p.a_columns : p.out_columns;
  grouped::launch_tiles<grouped_matmul_sm90_kernel<T, kLayout, Shape>>(
      name, grouped::sm90::config<Shape>(stream),
      grouped::sm90::WithMaps<Params>{
          with_grid(p, Shape::kHeight, Shape::kColumns),
          map_of<T>(name, p.a, 1, p.num_tokens, p.a_columns, kRunA, Shape::kRows),
          map_of<T>(name, p.b, matrices, rows, columns, kRunB, Shape::kColumns / Shape::kCluster)});
}

template <typename T, Layout kLayout>
void launch_layout(const Params& p, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (simt::has_wgmma() && fits_sm90(p)) {
      const auto launch_shape = [&]<typename Shape>() {
        launch_sm90<T, kLayout, Shape>(p, stream);
      };
      if constexpr (kLayout == Layout::kTn)
        return grouped::sm90::dispatch_depth(p.num_tokens / p.num_experts, launch_shape);
      else if (grouped::sm90::has_enough_rows(p.num_tokens, p.num_experts))
        return grouped::sm90::dispatch_height(
            p.num_tokens, p.num_experts, p.a_columns, [&]<int kHeight>() {
              grouped::sm90::dispatch_shape<kHeight>(p.a_columns, launch_shape);
            });
    }
    if (simt::compute_capability() >= 80 && fits_sm80(p)) {
      if constexpr (kLayout == Layout::kTn)
        return launch_sm80<T, kLayout, 128>(p, stream);
      else
        return grouped::sm80::dispatch_height(p.num_tokens, p.num_experts, [&]<int kRows>() {
          launch_sm80<T, kLayout, kRows>(p, stream);
        });
    }
  }
  launch_portable<T, kLayout>(p, stream);
}

}  // namespace

void launch(const Params& p, void* stream) {
  if (p.out_columns == 0 || (p.layout == Layout::kTn ? p.a_columns : p.num_tokens) == 0) return;
  dispatch_floating(p.dtype, [&]<typename T>() {
    switch (p.layout) {
      case Layout::kNt:
        return launch_layout<T, Layout::kNt>(p, stream);
      case Layout::kNn:
        return launch_layout<T, Layout::kNn>(p, stream);
      case Layout::kTn:
        return launch_layout<T, Layout::kTn>(p, stream);
    }
  });
}

bool torch_is_faster(const Params& p) {
#if !defined(__CUDACC__)
  if (simt::host::run_elsewhere) return false;  // the interpreter is there for these kernels
#endif
  const int capability = simt::compute_capability();
  return ((capability == 90 && !simt::has_wgmma()) || capability == 100) &&
         p.dtype == DType::kBFloat16 && fits_sm80(p) && p.num_tokens > 0 && p.a_columns > 0 &&
         p.out_columns > 0 && p.out_columns % 8 == 0;
}

void launch_check(const Params& p, void* stream) {
  grouped::launch_plan(
      {.expert_offsets = p.expert_offsets, .num_rows = p.num_tokens, .num_experts = p.num_experts},
      stream);
}

void launch_zeros(const Params& p, void* stream) {
  const auto run = [&]<Layout kLayout>() {
    simt::launch("grouped_matmul (zeros)", {.grid = 256, .block = kZeroThreads, .stream = stream},
                 zeros_kernel<kLayout>, p);
  };
  if (p.layout == Layout::kTn)
    run.template operator()<Layout::kTn>();
  else
    run.template operator()<Layout::kNt>();  // nn alike
}

}  // namespace mergeme::grouped_matmul
