#pragma once
#include "csrc/common/grouped_tile_sm90.cuh"
#include "csrc/ops/grouped_experts/kernel_sm80.cuh"

namespace mergeme::grouped_experts {

using grouped::sm90::WithMaps;

// Whether tensor maps can describe the operands.
inline bool fits_sm90(const Common& p) {
  using grouped::sm90::kMaxSide;
  return fits_sm80(p) && p.num_slots() > 0 && 0 < p.hidden && p.hidden <= kMaxSide &&
         0 < p.intermediate && 2 * p.intermediate <= kMaxSide;
}

// The contract of gate_up_kernel on tensor cores of sm_90. The first half of a tile's columns are
// gate columns and the second the same up columns, so that a thread has both sums of a pair.
template <typename T, typename Shape>
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1)
    gate_up_sm90_kernel([[maybe_unused]] const __grid_constant__ WithMaps<Params> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace grouped::sm90;
  using grouped::Tile;
  using Left = AnyRows<T, Shape::kRows>;
  using Right = RowPairs<Shape::kColumns>;
  constexpr int kWidth = Shape::kColumns / 2;  // columns of the activation in a tile
  constexpr int kPasses = kWidth / 32;         // to park a block of sums
  const T* x = static_cast<const T*>(p.x);
  const int hidden = static_cast<int>(p.hidden), width = static_cast<int>(p.intermediate);
  run_block<T, Shape>(
      RowTiles<Shape>{p.plan, p.grid, kWidth},
      [&](const Tile& t) { return t.group < p.num_experts ? hidden : 0; },
      [&](const Tile& t, int depth) {
        const int32_t* tokens = p.tokens + t.row;
        const int rows = t.end - t.row;
        return Operands{
            Left(depth, [&](int i) { return i < rows ? x + tokens[i] * p.hidden : nullptr; }),
            Right{&p.b_map, t.group, t.column, width + t.column}};
      },
      [&](const Tile& t, const typename Shape::Sums& sums, int first, char* patch) {
        const Parked parked(patch);
#pragma unroll 1
        for (int pass = 0; pass < Shape::kBlocks * kPasses; ++pass) {
          dispatch_number<Shape::kBlocks * kPasses>(pass, [&]<int kPass>() {
            constexpr int kFirst = kPass % kPasses * 16;
            parked.put<kFirst, Shape::kColumns / 4 + kFirst>(sums[kPass / kPasses]);
          });
          const int block = simt::lane_id() % 4,
                    column = t.column + pass % kPasses * 32 + 8 * block;
          dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
            for (int row = simt::lane_id() / 4; row < 16; row += 8) {
              const int64_t s = t.row + first + pass / kPasses * 64 + row;
              if (s >= t.end || column >= width) continue;
              Eight<T> gates, ups, activations;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const float4 g = parked.get(row, 2 * block + half);
                const float4 u = parked.get(row, 8 + 2 * block + half);
                float slope;
                gates.pairs[2 * half] = simt::round_pair<T>(g.x, g.y);
                gates.pairs[2 * half + 1] = simt::round_pair<T>(g.z, g.w);
                ups.pairs[2 * half] = simt::round_pair<T>(u.x, u.y);
                ups.pairs[2 * half + 1] = simt::round_pair<T>(u.z, u.w);
                activations.pairs[2 * half] = simt::round_pair<T>(
                    activate<kKind>(g.x, slope) * u.x, activate<kKind>(g.y, slope) * u.y);
                activations.pairs[2 * half + 1] = simt::round_pair<T>(
                    activate<kKind>(g.z, slope) * u.z, activate<kKind>(g.w, slope) * u.w);
              }
              activations.store(static_cast<T*>(p.activation) + s * p.intermediate + column);
              if (p.preactivation != nullptr) {
                T* saved = static_cast<T*>(p.preactivation) + s * 2 * p.intermediate + column;
                gates.store(saved);
                ups.store(saved + p.intermediate);
              }
            }
          });
          __syncwarp();  // the patch is free for the next pass
        }
      });
#endif
}

// The contract of rows_kernel on tensor cores of sm_90.
template <typename T, bool kNt, typename Shape>
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1)
    rows_sm90_kernel([[maybe_unused]] const __grid_constant__ WithMaps<RowsParams> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  grouped::sm90::multiply_rows<T, Shape, kNt>(p.plan, p.grid, &p.a_map, &p.b_map,
                                              static_cast<float*>(p.out), static_cast<int>(p.k),
                                              p.n, static_cast<int>(p.num_experts));
#endif
}

// The contract of sums_kernel on tensor cores of sm_90.
template <typename T, bool kGatherA, typename Shape>
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1)
    sums_sm90_kernel([[maybe_unused]] const __grid_constant__ WithMaps<SumsParams> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace grouped::sm90;
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  multiply_sums<T, Shape>(p.expert_offsets, p.grid, static_cast<T*>(p.out), p.n1, p.n2,
                          [&](const grouped::SumTile& t, int depth) {
                            const int32_t* tokens = p.tokens + t.begin;
                            if constexpr (kGatherA) {
                              using Left = AnySteps<T, Shape::kRows>;
                              using Right = Steps<Shape::kColumns, true>;
                              const int count = grouped::clamp_left(p.n1 - t.row, Shape::kRows);
                              return Operands{Left(depth, a + t.row, tokens, p.n1, count),
                                              Right{&p.b_map, 0, t.begin, t.column}};
                            } else {
                              using Left = Steps<Shape::kRows, true>;
                              using Right = AnySteps<T, Shape::kColumns>;
                              const int count =
                                  grouped::clamp_left(p.n2 - t.column, Shape::kColumns);
                              return Operands{Left{&p.a_map, 0, t.begin, t.row},
                                              Right(depth, b + t.column, tokens, p.n2, count)};
                            }
                          });
#endif
}

// The contract of grad_activation_kernel on tensor cores of sm_90. Four lanes own the columns of a
// row and add their sums by a fixed tree.
template <typename T, typename Shape>
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1) grad_activation_sm90_kernel(
    [[maybe_unused]] const __grid_constant__ WithMaps<BackwardParams> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace grouped::sm90;
  using grouped::Tile;
  using Left = AnyRows<T, Shape::kRows>;
  using Right = Steps<Shape::kColumns, false>;
  constexpr int kPasses = Shape::kColumns / 64;  // to park a block of sums
  const T* grad = static_cast<const T*>(p.grad);
  const float* weights = static_cast<const float*>(p.topk_weights);
  const int depth = needs_products(p) ? static_cast<int>(p.hidden) : 0;
  const int64_t width = p.intermediate;
  run_block<T, Shape>(
      RowTiles<Shape>{p.plan, p.grid}, [&](const Tile&) { return depth; },
      [&](const Tile& t, int) {
        const int32_t* tokens = p.tokens + t.row;
        const int rows = t.end - t.row;
        return Operands{
            Left(depth, [&](int i) { return i < rows ? grad + tokens[i] * p.hidden : nullptr; }),
            Right{&p.b_map, t.group, 0, t.column}};
      },
      [&](const Tile& t, const typename Shape::Sums& sums, int first, char* patch) {
        const Parked parked(patch);
        float parts[2] = {};
#pragma unroll 1
        for (int pass = 0; pass < Shape::kBlocks * kPasses; ++pass) {
          dispatch_number<Shape::kBlocks * kPasses>(pass, [&]<int kPass>() {
            constexpr int kFirst = kPass % kPasses * 32;
            parked.put<kFirst, kFirst + 16>(sums[kPass / kPasses]);
          });
          const int64_t top = t.row + first + pass / kPasses * 64;
          dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
              const int row = simt::lane_id() / 4 + i / 2 * 8;
              const int block = simt::lane_id() % 4 + i % 2 * 4;
              const int64_t s = top + row;
              const int64_t column = t.column + pass % kPasses * 64 + 8 * block;
              if (s >= t.end || column >= width) continue;
              const float weight = weights[p.permutation[s]];
              const int64_t place = s * 2 * width + column;
              const T* saved = static_cast<const T*>(p.preactivation) + place;
              Eight<T> gates, ups, grad_gates, grad_ups, activations;
              gates.load(saved);
              ups.load(saved + width);
              float part = 0;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const float4 four = parked.get(row, 2 * block + half);
                const float d[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int l = 0; l < 4; l += 2) {
                  const int j = 4 * half + l;
                  using Gradient = ActivationGradient<kKind, float>;
                  const Gradient one(d[l], weight, gates.get(j), ups.get(j));
                  const Gradient two(d[l + 1], weight, gates.get(j + 1), ups.get(j + 1));
                  part = simt::fma(d[l], one.activation, part);
                  part = simt::fma(d[l + 1], two.activation, part);
                  grad_gates.pairs[j / 2] = simt::round_pair<T>(one.gate, two.gate);
                  grad_ups.pairs[j / 2] = simt::round_pair<T>(one.up, two.up);
                  activations.pairs[j / 2] =
                      simt::round_pair<T>(weight * one.activation, weight * two.activation);
                }
              }
              T* grads = static_cast<T*>(p.grad_preactivation) + place;
              grad_gates.store(grads);
              grad_ups.store(grads + width);
              activations.store(static_cast<T*>(p.weighted) + s * width + column);
              parts[0] += i < 2 ? part : 0;
              parts[1] += i < 2 ? 0 : part;
            }
          });
          __syncwarp();  // the patch is free for the next pass
          if (pass % kPasses < kPasses - 1) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int lane = 1; lane < 4; lane *= 2)
              parts[half] += __shfl_xor_sync(simt::kFullWarp, parts[half], lane);
            const int64_t s = top + simt::lane_id() / 4 + 8 * half;
            if (s < t.end && simt::lane_id() % 4 == 0)
              static_cast<float*>(
                  p.weight_parts)[s * p.grid.column_tiles + t.column / Shape::kColumns] =
                  parts[half];
            parts[half] = 0;
          }
        }
      });
#endif
}

}  // namespace mergeme::grouped_experts
