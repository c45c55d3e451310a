#pragma once
#include "csrc/common/grouped_tile_sm80.cuh"
#include "csrc/ops/grouped_experts/kernel.cuh"

namespace mergeme::grouped_experts {

// Whether every 16-byte chunk that the tensor-core kernels copy is aligned and lies in one row;
// what they allocate themselves is aligned.
inline bool fits_sm80(const Common& p) {
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && is_aligned(p.x) &&
         is_aligned(p.gate_up) && is_aligned(p.down) && p.hidden % 8 == 0 &&
         p.intermediate % 8 == 0 && p.hidden <= grouped::sm80::kMaxDepth &&
         2 * p.intermediate <= grouped::sm80::kMaxDepth;
}

// Eight neighbours of a 16-bit type, in pairs.
template <typename T>
struct alignas(16) Eight {
  uint32_t pairs[4];

  __device__ __forceinline__ float get(int i) const {
    return simt::of_pair<T>(pairs[i / 2], i % 2);
  }
  __device__ __forceinline__ void load(const T* from) {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    pairs[0] = all.x, pairs[1] = all.y, pairs[2] = all.z, pairs[3] = all.w;
  }
  __device__ __forceinline__ void store(T* to) const { simt::store_16(to, pairs); }
};

// Columns of the activation in one tile: as many gate columns and as many up columns.
inline constexpr int kGateUpWidth = grouped::sm80::kColumns / 2;

// The contract of gate_up_kernel on tensor cores. A block owns kRows rows by 64 columns at a time.
// The tile's columns alternate, 8 gate then the same 8 up.
template <typename T, int kRows>
__global__ void __launch_bounds__(grouped::sm80::kThreads, grouped::sm80::kBlocksPerSm)
    gate_up_sm80_kernel(Params p) {
  using namespace grouped::sm80;
  using Shape = Shape<kRows>;
  using Left = AnyRows<T, kRows, Shape::kDepth>;
  // Tile columns kSpread apart are half of that apart among gate or up rows.
  constexpr int kApart = DepthFirst<T, kColumns, Shape::kDepth>::kSpread / 2;
  using Right = EvenRows<T, kColumns, Shape::kDepth, kApart>;
  char* shared = simt::dynamic_shared<char>();
  const T* x = static_cast<const T*>(p.x);
  const int64_t width = p.intermediate;
  grouped::for_each_row_tile(p.plan, p.grid, kRows, kGateUpWidth, [&](const grouped::Tile& tile) {
    const int rows = grouped::clamp_left(tile.end - tile.row, kRows);
    const int columns = grouped::clamp_left(width - tile.column, kGateUpWidth);
    const bool owned = tile.group < p.num_experts;
    const int depth = owned ? static_cast<int>(p.hidden) : 0;
    Left left(depth, [&](int i) {
      return i < rows && owned ? x + p.tokens[tile.row + i] * p.hidden : nullptr;
    });
    const int place = Right::own_row(), column = place / 16 * 8 + place % 8;
    const int count = column < columns ? (columns - column + kApart - 1) / kApart : 0;
    const int64_t weight_row = (owned ? tile.group : 0) * 2 * width + tile.column +
                               (place / 8 % 2 ? width : 0) + (count > 0 ? column : 0);
    Right right(depth, static_cast<const T*>(p.gate_up) + weight_row * p.hidden, p.hidden, count);
    typename Shape::Sums sum;
    multiply_tile<T, Shape>(shared, depth, left, right, sum);
    const Staged<float, Shape> staged(shared, sum);
    __syncthreads();
    T* activation = static_cast<T*>(p.activation) + tile.row * width + tile.column;
    T* saved = static_cast<T*>(p.preactivation);
    if (saved) saved += tile.row * 2 * width + tile.column;
    dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * (kGateUpWidth / 8); i += kThreads) {
        const int row = i / (kGateUpWidth / 8), block = i % (kGateUpWidth / 8);
        if (row >= rows || 8 * block >= columns) continue;
        Eight<T> gates, ups, activations;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto gate = staged.chunk(row, 4 * block + half);
          const auto up = staged.chunk(row, 4 * block + 2 + half);
#pragma unroll
          for (int l = 0; l < 4; l += 2) {
            const int pair = 2 * half + l / 2;
            float slope;
            gates.pairs[pair] = simt::round_pair<T>(gate.values[l], gate.values[l + 1]);
            ups.pairs[pair] = simt::round_pair<T>(up.values[l], up.values[l + 1]);
            activations.pairs[pair] =
                simt::round_pair<T>(activate<kKind>(gate.values[l], slope) * up.values[l],
                                    activate<kKind>(gate.values[l + 1], slope) * up.values[l + 1]);
          }
        }
        activations.store(activation + row * width + 8 * block);
        if (saved) {
          gates.store(saved + row * 2 * width + 8 * block);
          ups.store(saved + row * 2 * width + width + 8 * block);
        }
      }
    });
    __syncthreads();  // shared memory is free for the next tile
  });
}

// The contract of rows_kernel on tensor cores.
template <typename T, bool kNt, int kRows>
__global__ void __launch_bounds__(grouped::sm80::kThreads, grouped::sm80::kBlocksPerSm)
    rows_sm80_kernel(RowsParams p) {
  using namespace grouped::sm80;
  char* shared = simt::dynamic_shared<char>();
  grouped::for_each_row_tile(p.plan, p.grid, kRows, kColumns, [&](const grouped::Tile& tile) {
    multiply_rows<Shape<kRows>, kNt>(shared, tile, static_cast<const T*>(p.a),
                                     static_cast<const T*>(p.b), static_cast<float*>(p.out), p.k,
                                     p.n, p.num_experts);
  });
}

// The contract of sums_kernel on tensor cores, 128 x 128 tiles.
template <typename T, bool kGatherA>
__global__ void __launch_bounds__(grouped::sm80::kThreads, grouped::sm80::kBlocksPerSm)
    sums_sm80_kernel(SumsParams p) {
  using namespace grouped::sm80;
  using Shape = Shape<128>;
  using Even = EvenSteps<T, Shape::kDepth>;
  using Any = AnySteps<T, Shape::kDepth>;
  char* shared = simt::dynamic_shared<char>();
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  grouped::for_each_sum_tile(
      p.expert_offsets, p.grid, Shape::kRows, kColumns, [&](const grouped::SumTile& tile) {
        multiply_sums<Shape>(
            shared, tile, static_cast<T*>(p.out), p.n1, p.n2,
            [&](int depth, int rows) {
              if constexpr (kGatherA)
                return Any(depth, a + tile.row, p.tokens, tile.end, p.n1, rows);
              else
                return Even(depth, a + tile.begin * p.n1 + tile.row, p.n1, rows);
            },
            [&](int depth, int columns) {
              if constexpr (kGatherA)
                return Even(depth, b + tile.begin * p.n2 + tile.column, p.n2, columns);
              else
                return Any(depth, b + tile.column, p.tokens, tile.end, p.n2, columns);
            });
      });
}

// The contract of grad_activation_kernel on tensor cores. A block owns kRows x 128 of d at a time;
// the half of a warp that owns a row adds its sums by a fixed tree.
template <typename T, int kRows>
__global__ void __launch_bounds__(grouped::sm80::kThreads, grouped::sm80::kBlocksPerSm)
    grad_activation_sm80_kernel(BackwardParams p) {
  using namespace grouped::sm80;
  using Shape = Shape<kRows>;
  using Left = AnyRows<T, kRows, Shape::kDepth>;
  using Right = EvenSteps<T, Shape::kDepth>;
  constexpr int kBlocks = kColumns / 8;
  char* shared = simt::dynamic_shared<char>();
  const T* grad = static_cast<const T*>(p.grad);
  const T* down = static_cast<const T*>(p.down);
  const float* weights = static_cast<const float*>(p.topk_weights);
  const int64_t width = p.intermediate;
  grouped::for_each_row_tile(p.plan, p.grid, kRows, kColumns, [&](const grouped::Tile& tile) {
    const int rows = grouped::clamp_left(tile.end - tile.row, kRows);
    const int columns = grouped::clamp_left(width - tile.column, kColumns);
    const int depth = needs_products(p) ? static_cast<int>(p.hidden) : 0;
    Left left(depth,
              [&](int i) { return i < rows ? grad + p.tokens[tile.row + i] * p.hidden : nullptr; });
    Right right(depth, down + tile.group * p.hidden * width + tile.column, width, columns);
    typename Shape::Sums sum;
    multiply_tile<T, Shape>(shared, depth, left, right, sum);
    const Staged<float, Shape> staged(shared, sum);
    __syncthreads();
    const T* saved = static_cast<const T*>(p.preactivation) + tile.column;
    T* grads = static_cast<T*>(p.grad_preactivation) + tile.column;
    T* weighted = static_cast<T*>(p.weighted) + tile.column;
    dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kBlocks; i += kThreads) {
        const int row = i / kBlocks, block = i % kBlocks;
        const int64_t s = tile.row + row;
        float part = 0;
        if (row < rows && 8 * block < columns) {
          const float weight = weights[p.permutation[s]];
          const int64_t place = s * 2 * width + 8 * block;
          Eight<T> gates, ups, grad_gates, grad_ups, activations;
          gates.load(saved + place);
          ups.load(saved + place + width);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto d = staged.chunk(row, 2 * block + half);
#pragma unroll
            for (int l = 0; l < 4; l += 2) {
              const int j = 4 * half + l;
              using Gradient = ActivationGradient<kKind, float>;
              const Gradient first(d.values[l], weight, gates.get(j), ups.get(j));
              const Gradient second(d.values[l + 1], weight, gates.get(j + 1), ups.get(j + 1));
              part = simt::fma(d.values[l], first.activation, part);
              part = simt::fma(d.values[l + 1], second.activation, part);
              grad_gates.pairs[j / 2] = simt::round_pair<T>(first.gate, second.gate);
              grad_ups.pairs[j / 2] = simt::round_pair<T>(first.up, second.up);
              activations.pairs[j / 2] =
                  simt::round_pair<T>(weight * first.activation, weight * second.activation);
            }
          }
          grad_gates.store(grads + place);
          grad_ups.store(grads + place + width);
          activations.store(weighted + s * width + 8 * block);
        }
#pragma unroll
        for (int lane = 1; lane < kBlocks; lane *= 2)
          part += __shfl_xor_sync(simt::kFullWarp, part, lane);
        if (row < rows && block == 0)
          static_cast<float*>(p.weight_parts)[s * p.grid.column_tiles + tile.column / kColumns] =
              part;
      }
    });
    __syncthreads();  // shared memory is free for the next tile
  });
}

}  // namespace mergeme::grouped_experts
