#pragma once
#include "csrc/common/grouped_tile_fp8_sm90.cuh"
#include "csrc/ops/grouped_experts_fp8/kernel.cuh"

namespace mergeme::grouped_experts_fp8 {

// Whether a tensor map can describe the weights, and rows are whole chunks.
inline bool fits_sm90(const Params& p) {
  using grouped::sm90::kMaxSide;
  return is_aligned(p.gate_up) && is_aligned(p.quantized) && is_aligned(p.activation) &&
         p.hidden % 16 == 0 && p.intermediate % 8 == 0 && p.num_slots() > 0 && 0 < p.hidden &&
         p.hidden <= kMaxSide && 0 < p.intermediate && 2 * p.intermediate <= kMaxSide;
}

// The contract of gate_up_fp8_kernel on tensor cores of sm_90, whose sums over a block of 128 have
// about 14 bits. The first half of a tile's columns are gate columns and the second the same up
// columns, so that a thread has both sums of a pair.
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1) gate_up_fp8_sm90_kernel(
    [[maybe_unused]] const __grid_constant__ grouped::sm90::WithMaps<Params> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace grouped::sm90;
  using grouped::Tile;
  using T = float8_e4m3_t;
  using Shape = Scaled;
  using Left = AnyRows<T, Shape::kRows>;
  using Right = RowPairs<Shape::kColumns, kDepthOf<T>>;
  constexpr int kWidth = Shape::kColumns / 2;  // columns of the activation in a tile
  static_assert(kScaleBlock % kWidth == 0);
  const int hidden = static_cast<int>(p.hidden), width = static_cast<int>(p.intermediate);
  const int64_t blocks = scale_blocks(hidden), up_blocks = scale_blocks(width);
  run_block<T, Shape>(
      RowTiles<Shape>{p.plan, p.grid, kWidth},
      [&](const Tile& t) { return t.group < p.num_experts ? hidden : 0; },
      [&](const Tile& t, int depth) {
        const int32_t* tokens = p.tokens + t.row;
        const int rows = t.end - t.row;
        return Operands{
            Left(depth,
                 [&](int i) { return i < rows ? p.quantized + tokens[i] * p.hidden : nullptr; }),
            Right{&p.b_map, t.group, t.column, width + t.column}};
      },
      [&](const Tile& t, Ring<Shape>& ring, int depth, int group, int row, Shape::Sums& sums) {
        const int first = t.row + row + simt::lane_id() / 4;
        const auto of_row = [&](int s) {
          return s < t.end ? p.quantized_scale + p.tokens[s] * blocks : nullptr;
        };
        const float* gate =
            p.gate_up_scale + (t.group * 2 * up_blocks + t.column / kScaleBlock) * blocks;
        multiply_scaled_tile<true>(
            ring, depth, group,
            {{of_row(first), of_row(first + 8)}, {gate, gate + up_blocks * blocks}}, sums);
      },
      [&](const Tile& t, const Shape::Sums& sums, int first, char* patch) {
        const Parked parked(patch);
#pragma unroll 1
        for (int pass = 0; pass < kWidth / 32; ++pass) {
          dispatch_number<kWidth / 32>(
              pass, [&]<int kPass>() { parked.put<16 * kPass, 32 + 16 * kPass>(sums[0]); });
          const int chunk = simt::lane_id() % 8, column = t.column + pass * 32 + 4 * chunk;
          grouped_experts::dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
            for (int row = simt::lane_id() / 8; row < 16; row += 4) {
              const int64_t s = t.row + first + row;
              if (s >= t.end || column >= width) continue;
              const float4 g = parked.get(row, chunk), u = parked.get(row, 8 + chunk);
              float slope;
              *reinterpret_cast<float4*>(p.activation + s * p.intermediate + column) =
                  float4{grouped_experts::activate<kKind>(g.x, slope) * u.x,
                         grouped_experts::activate<kKind>(g.y, slope) * u.y,
                         grouped_experts::activate<kKind>(g.z, slope) * u.z,
                         grouped_experts::activate<kKind>(g.w, slope) * u.w};
            }
          });
          __syncwarp();  // the patch is free for the next pass
        }
      });
#endif
}

}  // namespace mergeme::grouped_experts_fp8
