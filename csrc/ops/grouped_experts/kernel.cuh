#pragma once
#include "csrc/common/grouped_tile.cuh"
#include "csrc/ops/grouped_experts/activation.cuh"
#include "csrc/ops/grouped_experts/params.h"

namespace mergeme::grouped_experts {

// Rows of a matrix [T, H] gathered by token; shared memory of the kernels that use OwnSums too.
template <typename T>
struct GatherShared {
  grouped::TileShared<acc_t<T>> tile;
  const T* rows[grouped::kTile];  // null past the expert's end
};

// Fills shared.rows with the tokens of the tile's rows.
template <typename T>
__device__ __forceinline__ void gather_rows(GatherShared<T>& shared, const T* matrix,
                                            const int32_t* tokens, int64_t columns, int rows) {
  static_assert(grouped::kTile == grouped::kTileThreads);
  const int own = threadIdx.x;
  __syncthreads();  // the last tile's rows have been read
  shared.rows[own] = own < rows ? matrix + tokens[own] * columns : nullptr;
  __syncthreads();
}

// A thread's own sums in shared memory, so that a rolled loop can go over them: unrolled, the
// activations would be compiled 64 times. Takes the place of the tile's operands.
template <typename Acc>
class OwnSums {
 public:
  static constexpr int kBytes = 64 * grouped::kTileThreads * int{sizeof(Acc)};
  __device__ __forceinline__ explicit OwnSums(const Acc (&sum)[8][8])
      : own_(simt::dynamic_shared<Acc>() + threadIdx.x) {
    __syncthreads();  // the last operands have been read
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) own_[(8 * i + j) * grouped::kTileThreads] = sum[i][j];
  }
  __device__ __forceinline__ Acc operator()(int i, int j) const {
    return own_[(8 * i + j) * grouped::kTileThreads];
  }

 private:
  Acc* own_;
};

// activation[s, i] = f(gate) * up with gate = gate_e[i] . x[token of s] and up = up_e[i] . x[token
// of s], and both to preactivation. A block owns 64 rows by 32 columns at a time: its first 32
// products are with gate rows, the other 32 with the same columns' up rows, and both of a pair
// belong to one thread.
template <typename T>
__global__ void __launch_bounds__(grouped::kTileThreads) gate_up_kernel(Params p) {
  using Acc = acc_t<T>;
  using grouped::kTile;
  constexpr int kWidth = kTile / 2;
  auto& shared = *simt::dynamic_shared<GatherShared<T>>();
  const int64_t width = p.intermediate;
  grouped::for_each_row_tile(p.plan, p.grid, kTile, kWidth, [&](const grouped::Tile& tile) {
    const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
    const int columns = grouped::clamp_left(width - tile.column, kWidth);
    const bool owned = tile.group < p.num_experts;
    gather_rows(shared, static_cast<const T*>(p.x), p.tokens + tile.row, p.hidden,
                owned ? rows : 0);
    const T* gate = static_cast<const T*>(p.gate_up) +
                    ((owned ? tile.group : 0) * 2 * width + tile.column) * p.hidden;
    const T* up = gate + width * p.hidden;
    Acc sum[8][8];
    grouped::multiply_tile<true, true>(
        shared.tile, owned ? p.hidden : 0,
        [&](int i, int64_t k) {
          const T* row = shared.rows[i];
          return row ? to_acc(row[k]) : Acc{0};
        },
        [&](int j, int64_t k) {
          const T* from = j < kWidth ? gate : up;
          return j % kWidth < columns ? to_acc(from[j % kWidth * p.hidden + k]) : Acc{0};
        },
        sum);
    T* activation = static_cast<T*>(p.activation) + tile.row * width + tile.column;
    T* saved = static_cast<T*>(p.preactivation);
    if (saved) saved += tile.row * 2 * width + tile.column;
    const OwnSums<Acc> sums(sum);
    dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const int row = grouped::tile_index(threadIdx.x / 8, i);
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          const int column = grouped::tile_index(threadIdx.x % 8, j);
          if (row >= rows || column >= columns) continue;
          const Acc gate_sum = sums(i, j), up_sum = sums(i, j + 4);
          Acc slope;
          activation[row * width + column] = from_acc<T>(activate<kKind>(gate_sum, slope) * up_sum);
          if (saved) {
            saved[row * 2 * width + column] = from_acc<T>(gate_sum);
            saved[row * 2 * width + width + column] = from_acc<T>(up_sum);
          }
        }
      }
    });
  });
}

// out[s, n] = sum over k of a[s, k] b[e, n, k] (kNt) or b[e, k, n], for every row s of expert e.
struct RowsParams {
  const void* a;  // [S, k]
  const void* b;  // kNt: [E, n, k], else [E, k, n]
  void* out;      // [S, n] in the accumulation type
  grouped::Plan plan;
  int64_t k;
  int64_t n;
  int64_t num_experts;
  grouped::TileGrid grid = {};  // set by launch()
};

// A block owns one tile of results at a time.
template <typename T, bool kNt>
__global__ void __launch_bounds__(grouped::kTileThreads) rows_kernel(RowsParams p) {
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<grouped::TileShared<acc_t<T>>>();
  grouped::for_each_row_tile(p.plan, p.grid, kTile, kTile, [&](const grouped::Tile& tile) {
    grouped::multiply_rows<kNt>(shared, tile, static_cast<const T*>(p.a),
                                static_cast<const T*>(p.b), static_cast<acc_t<T>*>(p.out), p.k, p.n,
                                p.num_experts);
  });
}

// out[e, i, j] = sum over the rows m of expert e of a[m, i] b[m, j]. One of the operands is given
// by token: its row m is row tokens[m].
struct SumsParams {
  const void* a;  // [S or T, n1]
  const void* b;  // [S or T, n2]
  void* out;      // [E, n1, n2]
  const int32_t* expert_offsets;
  const int32_t* tokens;
  int64_t n1;
  int64_t n2;
  int64_t num_experts;
  grouped::TileGrid grid = {};  // set by launch()
};

// A block owns one tile of results at a time.
template <typename T, bool kGatherA>
__global__ void __launch_bounds__(grouped::kTileThreads) sums_kernel(SumsParams p) {
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<grouped::TileShared<acc_t<T>>>();
  grouped::for_each_sum_tile(
      p.expert_offsets, p.grid, kTile, kTile, [&](const grouped::SumTile& tile) {
        grouped::multiply_sums(shared, tile, static_cast<const T*>(p.a),
                               kGatherA ? p.tokens : nullptr, static_cast<const T*>(p.b),
                               kGatherA ? nullptr : p.tokens, static_cast<T*>(p.out), p.n1, p.n2);
      });
}

// What becomes of the gradient `unweighted` of one activation before its weighting.
template <Activation kKind, typename Acc>
struct ActivationGradient {
  Acc activation, gate, up;
  __device__ __forceinline__ ActivationGradient(Acc unweighted, Acc weight, Acc g, Acc u) {
    Acc slope;
    const Acc value = activate<kKind>(g, slope), weighted = weight * unweighted;
    activation = value * u;
    gate = weighted * u * slope;
    up = weighted * value;
  }
};

// Only grad_down does without d below.
__device__ __forceinline__ bool needs_products(const BackwardParams& p) {
  return p.grad_x != nullptr || p.grad_gate_up != nullptr || p.grad_weights != nullptr;
}

// With d[s, i] = sum_h grad[token of s, h] down_e[h, i], the gradient of the activation before its
// weighting, and the activation and its derivatives from preactivation: grad_preactivation,
// weighted, and for every row and tile of columns the part of <d, activation> = <grad, expert
// output>, the weight's gradient. A block owns 64 x 64 of d at a time; 8 lanes of a warp own the
// columns of a row and add their sums by a fixed tree.
template <typename T>
__global__ void __launch_bounds__(grouped::kTileThreads) grad_activation_kernel(BackwardParams p) {
  using Acc = acc_t<T>;
  using grouped::kTile;
  auto& shared = *simt::dynamic_shared<GatherShared<T>>();
  const int64_t width = p.intermediate;
  const Acc* weights = static_cast<const Acc*>(p.topk_weights);
  grouped::for_each_row_tile(p.plan, p.grid, kTile, kTile, [&](const grouped::Tile& tile) {
    const int rows = grouped::clamp_left(tile.end - tile.row, kTile);
    const int columns = grouped::clamp_left(width - tile.column, kTile);
    gather_rows(shared, static_cast<const T*>(p.grad), p.tokens + tile.row, p.hidden, rows);
    const T* right = static_cast<const T*>(p.down) + tile.group * p.hidden * width + tile.column;
    Acc sum[8][8];
    grouped::multiply_tile<true, false>(
        shared.tile, needs_products(p) ? p.hidden : 0,
        [&](int i, int64_t k) {
          const T* row = shared.rows[i];
          return row ? to_acc(row[k]) : Acc{0};
        },
        [&](int j, int64_t k) { return j < columns ? to_acc(right[k * width + j]) : Acc{0}; }, sum);
    const T* saved = static_cast<const T*>(p.preactivation) + tile.column;
    T* grads = static_cast<T*>(p.grad_preactivation) + tile.column;
    T* weighted = static_cast<T*>(p.weighted) + tile.column;
    const OwnSums<Acc> sums(sum);
    dispatch_activation(p.kind, [&]<Activation kKind>() {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const int row = grouped::tile_index(threadIdx.x / 8, i);
        const int64_t s = tile.row + row;
        const Acc weight = row < rows ? weights[p.permutation[s]] : Acc{0};
        Acc part = 0;
#pragma unroll 1
        for (int j = 0; j < 8; ++j) {
          const int column = grouped::tile_index(threadIdx.x % 8, j);
          if (row >= rows || column >= columns) continue;
          const Acc d = sums(i, j);
          const ActivationGradient<kKind, Acc> gradient(
              d, weight, to_acc(saved[s * 2 * width + column]),
              to_acc(saved[s * 2 * width + width + column]));
          part = simt::fma(d, gradient.activation, part);
          grads[s * 2 * width + column] = from_acc<T>(gradient.gate);
          grads[s * 2 * width + width + column] = from_acc<T>(gradient.up);
          weighted[s * width + column] = from_acc<T>(weight * gradient.activation);
        }
#pragma unroll
        for (int lane = 1; lane < 8; lane *= 2)
          part += __shfl_xor_sync(simt::kFullWarp, part, lane);
        if (row < rows && threadIdx.x % 8 == 0)
          static_cast<Acc*>(p.weight_parts)[s * p.grid.column_tiles + tile.column / kTile] = part;
      }
    });
  });
}

// grad_weights[slot] = the sum of its row's parts, in order; zero for a row of no expert. A thread
// owns a slot.
struct WeightsParams {
  void* grad_weights;        // [S]
  const void* weight_parts;  // [S, parts]
  const int32_t* expert_offsets;
  const int32_t* inverse;
  int64_t num_slots;
  int64_t num_experts;
  int64_t parts;
};
inline constexpr int kWeightsThreads = 256;
template <typename Acc>
__global__ void __launch_bounds__(kWeightsThreads) grad_weights_kernel(WeightsParams p) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t end = p.expert_offsets[p.num_experts];
  for (int64_t s = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; s < p.num_slots; s += step) {
    const int64_t row = p.inverse[s];
    Acc sum = 0;
    if (row < end)
      for (int64_t i = 0; i < p.parts; ++i)
        sum += static_cast<const Acc*>(p.weight_parts)[row * p.parts + i];
    static_cast<Acc*>(p.grad_weights)[s] = sum;
  }
}

// out[t, h] = sum over k in order of weights[t, k] * rows[inverse[t * K + k], h], or without
// weights, over the rows that belong to an expert.
struct CombineParams {
  void* out;            // [T, H]
  const void* rows;     // [S, H] in the accumulation type
  const void* weights;  // [T, K] or null
  const int32_t* expert_offsets;
  const int32_t* inverse;
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_experts;
  int64_t hidden;
};
inline constexpr int kCombineThreads = 256;

// One block per token at a time; a thread owns kWidth neighbouring h of every 256 * kWidth.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(CombineParams p) {
  simt::begin_overlapped();
  using Acc = acc_t<T>;
  struct alignas(kWidth * sizeof(Acc)) Sums {
    Acc values[kWidth];
  };
  struct alignas(kWidth * sizeof(T)) Outs {
    T values[kWidth];
  };
  const Acc* rows = static_cast<const Acc*>(p.rows);
  const Acc* weights = static_cast<const Acc*>(p.weights);
  T* out = static_cast<T*>(p.out);
  const int64_t end = p.expert_offsets[p.num_experts];
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x)
    for (int64_t h = int64_t{threadIdx.x} * kWidth; h < p.hidden; h += kCombineThreads * kWidth) {
      Sums sums{};
      for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
        const int64_t row = p.inverse[slot];
        if (row >= end) continue;
        const auto values = *reinterpret_cast<const Sums*>(rows + row * p.hidden + h);
        const Acc weight = weights != nullptr ? weights[slot] : Acc{1};
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          sums.values[i] = simt::fma(weight, values.values[i], sums.values[i]);
      }
      Outs outs;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) outs.values[i] = from_acc<T>(sums.values[i]);
      *reinterpret_cast<Outs*>(out + t * p.hidden + h) = outs;
    }
}

}  // namespace mergeme::grouped_experts
