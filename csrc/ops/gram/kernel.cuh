#pragma once
#include "csrc/ops/gram/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::gram {

inline constexpr int kRowWarps = 8;   // warps of a CUDA block along rows
inline constexpr int kColumns = 128;  // threads of a CUDA block along columns

// sum + x * y; of numbers that were float32 the product is exact, so fusing changes no bit.
template <typename Acc>
__device__ __forceinline__ double add_product(double x, double y, double sum) {
  if constexpr (sizeof(Acc) == 4) return simt::fma(x, y, sum);
  return sum + x * y;
}

// The square of pairs that blockIdx.y stands for: models `left` and on by models `right` and on,
// left <= right; both hold kTile models.
template <int kTile>
struct PairTile {
  int64_t left, right;
  __device__ explicit PairTile(int64_t number) {
    int64_t column = 0;
    while (number > column) number -= ++column;
    left = number * kTile;
    right = column * kTile;
  }
};

// The sums of one tile of pairs, in registers.
template <typename T, int kTile>
class PairSums {
 public:
  __device__ PairSums(const Params& p, const PairTile<kTile>& tile) : p_(p), tile_(tile) {}

  __device__ __forceinline__ void add(int64_t i) {
    using Acc = acc_t<T>;
    const Acc base = p_.base ? to_acc(static_cast<const T*>(p_.base)[i]) : Acc(0);
    double x[kTile], y[kTile];
#pragma unroll
    for (int m = 0; m < kTile; ++m) {
      x[m] = value(tile_.left + m, i, base);
      y[m] = tile_.left == tile_.right ? x[m] : value(tile_.right + m, i, base);
    }
#pragma unroll
    for (int a = 0; a < kTile; ++a)
#pragma unroll
      for (int b = 0; b < kTile; ++b)
        if (tile_.left != tile_.right || a <= b)
          sums_[a][b] = add_product<Acc>(x[a], y[b], sums_[a][b]);
  }

  // Calls f(pair number, sum) for every pair of the tile that there is.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int a = 0; a < kTile; ++a)
#pragma unroll
      for (int b = 0; b < kTile; ++b)
        if (tile_.left + a <= tile_.right + b && tile_.right + b < p_.num_models)
          f(pair_of(tile_.left + a, tile_.right + b), sums_[a][b]);
  }

 private:
  __device__ __forceinline__ double value(int64_t m, int64_t i, acc_t<T> base) const {
    if (m >= p_.num_models) return 0;
    const acc_t<T> x = to_acc(static_cast<const T*>(p_.tensors[m])[i]);
    return p_.base ? x - base : x;
  }

  const Params& p_;
  const PairTile<kTile>& tile_;
  double sums_[kTile][kTile] = {};
};

// partials[g, b, pair] of the pairs in blockIdx.y's tile. A warp owns blocks of vectors,
// grid-stride in x; its lanes are those of the sum.
template <typename T, int kTile>
__global__ void row_kernel(Params p) {
  const PairTile<kTile> tile(blockIdx.y);
  const int64_t units = p.groups * p.blocks, pairs = num_pairs(p.num_models);
  const int lane = int(simt::lane_id());
  for (int64_t u = int64_t{blockIdx.x} * kRowWarps + simt::warp_id(); u < units;
       u += int64_t{gridDim.x} * kRowWarps) {
    const int64_t group = u / p.blocks, block = u % p.blocks;
    const int64_t begin = group * p.length + block * kRowBlock;
    const int64_t rest = p.length - block * kRowBlock;
    const int64_t end = begin + (rest < kRowBlock ? rest : kRowBlock);
    PairSums<T, kTile> sums(p, tile);
    for (int64_t i = begin + lane; i < end; i += kSumLanes) sums.add(i);
    sums.each([&](int64_t pair, double sum) {
      for (int half = kSumLanes / 2; half > 0; half /= 2)
        sum += __shfl_down_sync(simt::kFullWarp, sum, half);
      if (lane == 0) p.partials[u * pairs + pair] = sum;
    });
  }
}

// partials[b, pair, g] of the pairs in blockIdx.y's tile. A thread owns vectors, grid-stride in x,
// and blocks of them, grid-stride in z.
template <typename T, int kTile>
__global__ void column_kernel(Params p) {
  const PairTile<kTile> tile(blockIdx.y);
  const int64_t pairs = num_pairs(p.num_models), step = int64_t{gridDim.x} * kColumns;
  for (int64_t block = blockIdx.z; block < p.blocks; block += gridDim.z) {
    const int64_t begin = block * kColumnBlock;
    const int64_t end = p.length - begin < kColumnBlock ? p.length : begin + kColumnBlock;
    for (int64_t g = int64_t{blockIdx.x} * kColumns + threadIdx.x; g < p.groups; g += step) {
      PairSums<T, kTile> sums(p, tile);
      for (int64_t row = begin; row < end; ++row) sums.add(row * p.groups + g);
      sums.each([&](int64_t pair, double sum) {
        p.partials[(block * pairs + pair) * p.groups + g] = sum;
      });
    }
  }
}

// out[g, i, j] = out[g, j, i] = the sum of the pair's partials, in index order. A thread owns one
// entry of a matrix, grid-stride.
__global__ void finish_kernel(Params p) {
  const int64_t pairs = num_pairs(p.num_models), entries = p.num_models * p.num_models;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < p.groups * entries;
       e += step) {
    const int64_t group = e / entries, i = e % entries / p.num_models, j = e % p.num_models;
    const int64_t pair = i < j ? pair_of(i, j) : pair_of(j, i);
    double sum = 0;
    for (int64_t b = 0; b < p.blocks; ++b)
      sum += p.axis == Axis::kRow ? p.partials[(group * p.blocks + b) * pairs + pair]
                                  : p.partials[(b * pairs + pair) * p.groups + group];
    p.out[e] = sum;
  }
}

}  // namespace mergeme::gram
