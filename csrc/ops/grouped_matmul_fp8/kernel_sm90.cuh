#pragma once
#include "csrc/common/grouped_tile_fp8_sm90.cuh"
#include "csrc/ops/grouped_matmul_fp8/kernel.cuh"

namespace mergeme::grouped_matmul_fp8 {

// Whether tensor maps can describe the operands and rows of results are whole chunks.
template <typename Out>
bool fits_sm90(const Params& p) {
  using grouped::sm90::kMaxSide;
  return is_aligned(p.a) && is_aligned(p.b) && is_aligned(p.out) && p.depth % 16 == 0 &&
         p.columns * int64_t{sizeof(Out)} % 16 == 0 && p.num_rows > 0 && p.depth > 0 &&
         p.depth <= kMaxSide && p.columns <= kMaxSide;
}

// The contract of grouped_matmul_fp8_kernel on tensor cores of sm_90, whose sums over a block of
// 128 k have about 14 bits. A block owns one 128 x 128 tile of results at a time; every result
// belongs to one tile and one thread, so plain stores do.
template <typename Out>
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1) grouped_matmul_fp8_sm90_kernel(
    [[maybe_unused]] const __grid_constant__ grouped::sm90::WithMaps<Params> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace grouped::sm90;
  using grouped::Tile;
  using T = float8_e4m3_t;
  using Shape = Scaled;
  using Left = Rows<Shape::kRows, 1, kDepthOf<T>>;
  using Right = Rows<Shape::kColumns, 1, kDepthOf<T>>;
  const int64_t blocks = scale_blocks(p.depth);
  run_block<T, Shape>(
      RowTiles<Shape>{p.plan, p.grid},
      [&](const Tile& t) { return t.group < p.num_experts ? static_cast<int>(p.depth) : 0; },
      [&](const Tile& t, int) {
        return Operands{Left{&p.a_map, 0, t.row}, Right{&p.b_map, t.group, t.column}};
      },
      [&](const Tile& t, Ring<Shape>& ring, int depth, int group, int row, Shape::Sums& sums) {
        // Rows past the end of the group are multiplied too, and not stored.
        const int first = t.row + row + simt::lane_id() / 4;
        const float* of_row = p.a_scale + first * blocks;
        const float* of_columns =
            p.b_scale + (t.group * scale_blocks(p.columns) + t.column / kScaleBlock) * blocks;
        multiply_scaled_tile<false>(
            ring, depth, group,
            {{first < t.end ? of_row : nullptr, first + 8 < t.end ? of_row + 8 * blocks : nullptr},
             {of_columns, of_columns}},
            sums);
      },
      [&](const Tile& t, const Shape::Sums& sums, int row, char* patch) {
        const int first = t.row + row;
        store_sums(sums[0], patch, static_cast<Out*>(p.out) + first * p.columns + t.column,
                   p.columns, t.end - first,
                   grouped::clamp_left(p.columns - t.column, Shape::kColumns));
      });
#endif
}

}  // namespace mergeme::grouped_matmul_fp8
