// Kernels in CUDA C for the tests of the interpreter: each once as it should be, and once for every
// mistake of its enum. Compiled by nvcc to PTX, never run otherwise.
#include <cuda_bf16.h>

#include <cassert>
#include <cstdint>

namespace {

constexpr unsigned kAll = 0xffffffff;

__device__ float warp_sum(float x, unsigned members) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(members, x, step);
  return x;
}
__device__ float warp_max(float x) {
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

}  // namespace

// out += sum of x[n]: by warps, then over the warps of a block, then over blocks.
enum class SumMistake { kNone, kNoBarrier, kWrongMembers, kReadsBeyond };

template <SumMistake kMistake>
__global__ void sum(const float* x, float* out, int n) {
  __shared__ float of_warp[32];
  const int end = kMistake == SumMistake::kReadsBeyond ? n + 1 : n;
  float total = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < end; i += gridDim.x * blockDim.x)
    total += x[i];
  total = warp_sum(total, kMistake == SumMistake::kWrongMembers ? kAll >> 1 : kAll);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  if (kMistake != SumMistake::kNoBarrier) __syncthreads();
  if (threadIdx.x >= 32) return;
  total = warp_sum(threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0, kAll);
  if (threadIdx.x == 0) atomicAdd(out, total);
}
template __global__ void sum<SumMistake::kNone>(const float*, float*, int);
template __global__ void sum<SumMistake::kNoBarrier>(const float*, float*, int);
template __global__ void sum<SumMistake::kWrongMembers>(const float*, float*, int);
template __global__ void sum<SumMistake::kReadsBeyond>(const float*, float*, int);

// The k largest of each row, one after the other: one block a row, the row in dynamic shared
// memory.
enum class TopMistake { kNone, kNoBarrier };

template <TopMistake kMistake>
__global__ void top_k(const float* x, int* ids, int n, int k) {
  extern __shared__ float row[];
  __shared__ float best_of_warp[32];
  __shared__ int id_of_warp[32];
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = x[blockIdx.x * n + i];
  for (int round = 0; round < k; round++) {
    if (kMistake != TopMistake::kNoBarrier) __syncthreads();
    float best = -INFINITY;
    int id = n;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
      if (row[i] > best) {
        best = row[i];
        id = i;
      }
    const float of_all = warp_max(best);
    id = __reduce_min_sync(kAll, best == of_all ? id : n);
    if (threadIdx.x % 32 == 0) {
      best_of_warp[threadIdx.x / 32] = of_all;
      id_of_warp[threadIdx.x / 32] = id;
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int warp = 0; warp < blockDim.x / 32; warp++)
      if (best_of_warp[warp] > best || (best_of_warp[warp] == best && id_of_warp[warp] < id)) {
        best = best_of_warp[warp];
        id = id_of_warp[warp];
      }
    ids[blockIdx.x * k + round] = id;
    row[id] = -INFINITY;
  }
}
template __global__ void top_k<TopMistake::kNone>(const float*, int*, int, int);
template __global__ void top_k<TopMistake::kNoBarrier>(const float*, int*, int, int);

// counts[b] += how often b is in x[n]: in shared memory first.
enum class HistogramMistake { kNone, kNoAtomics, kNoBoundsCheck };

template <HistogramMistake kMistake>
__global__ void histogram(const int* x, unsigned* counts, int n, int bins) {
  extern __shared__ unsigned of_block[];
  for (int b = threadIdx.x; b < bins; b += blockDim.x) of_block[b] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    if (kMistake != HistogramMistake::kNoBoundsCheck && (x[i] < 0 || x[i] >= bins)) continue;
    if (kMistake == HistogramMistake::kNoAtomics)
      of_block[x[i]]++;
    else
      atomicAdd(&of_block[x[i]], 1u);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += blockDim.x) atomicAdd(&counts[b], of_block[b]);
}
template __global__ void histogram<HistogramMistake::kNone>(const int*, unsigned*, int, int);
template __global__ void histogram<HistogramMistake::kNoAtomics>(const int*, unsigned*, int, int);
template __global__ void histogram<HistogramMistake::kNoBoundsCheck>(const int*, unsigned*, int,
                                                                     int);

// out[cols, rows] = in[rows, cols] transposed, by tiles of 32 x 32 and blocks of 32 x 8.
enum class TransposeMistake { kNone, kNoBarrier, kNoPadding, kNoEdges };

template <TransposeMistake kMistake>
__global__ void transpose(const float* in, float* out, int rows, int cols) {
  constexpr int kSide = 32;
  __shared__ float tile[kSide][kMistake == TransposeMistake::kNoPadding ? kSide : kSide + 1];
  int x = blockIdx.x * kSide + threadIdx.x;
  int y = blockIdx.y * kSide + threadIdx.y;
  for (int k = 0; k < kSide; k += 8)
    if (kMistake == TransposeMistake::kNoEdges || (x < cols && y + k < rows))
      tile[threadIdx.y + k][threadIdx.x] = in[(y + k) * cols + x];
  if (kMistake != TransposeMistake::kNoBarrier) __syncthreads();
  x = blockIdx.y * kSide + threadIdx.x;
  y = blockIdx.x * kSide + threadIdx.y;
  for (int k = 0; k < kSide; k += 8)
    if (x < rows && y + k < cols) out[(y + k) * rows + x] = tile[threadIdx.x][threadIdx.y + k];
}
template __global__ void transpose<TransposeMistake::kNone>(const float*, float*, int, int);
template __global__ void transpose<TransposeMistake::kNoBarrier>(const float*, float*, int, int);
template __global__ void transpose<TransposeMistake::kNoPadding>(const float*, float*, int, int);
template __global__ void transpose<TransposeMistake::kNoEdges>(const float*, float*, int, int);

// c[M, N] = a[M, K] b[N, K]^T by tiles of 64 x 64 x 32 and four warps: cp.async in three stages,
// ldmatrix, mma.sync.
enum class MatmulMistake { kNone, kNoWait, kNoBarrier, kNoEdges };

template <MatmulMistake kMistake>
__global__ void __launch_bounds__(128)
    matmul(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  constexpr int kStages = 3;
  constexpr int kTile = 64;
  constexpr int kDepth = 32;
  constexpr int kPitch = kDepth + 8;  // rows of ldmatrix fall on different banks
  __shared__ __align__(16) __nv_bfloat16 tiles[2][kStages][kTile * kPitch];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kTile;
  const int first_col = blockIdx.x * kTile;
  const auto shared = [](const void* p) { return uint32_t(__cvta_generic_to_shared(p)); };

  const auto load = [&](int step) {
    for (int part = 0; part < 2; part++) {
      const int chunk = threadIdx.x + part * 128;
      const int row = chunk / 4;
      const int col = chunk % 4 * 8;
      for (int which = 0; which < 2; which++) {
        const __nv_bfloat16* source = which ? b : a;
        const int at = row + (which ? first_col : first_row);
        const bool inside = at < (which ? n : m) && step * kDepth + col < k;
        const auto* from = source + (inside ? int64_t{at} * k + step * kDepth + col : 0);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         shared(&tiles[which][step % kStages][row * kPitch + col])),
                     "l"(from), "r"(inside ? 16 : 0));
      }
    }
  };
  const auto commit = [] { asm volatile("cp.async.commit_group;"); };

  const int steps = (k + kDepth - 1) / kDepth;
  for (int step = 0; step < kStages - 1; step++) {
    if (step < steps) load(step);
    commit();
  }
  float sums[2][4][4] = {};
  const int warp_row = warp % 2 * 32;
  const int warp_col = warp / 2 * 32;
  for (int step = 0; step < steps; step++) {
    if (kMistake != MatmulMistake::kNoWait) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (kMistake != MatmulMistake::kNoBarrier) __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    commit();
    for (int inner = 0; inner < kDepth; inner += 16) {
      uint32_t fa[2][4];
      uint32_t fb[4][2];
      for (int i = 0; i < 2; i++) {
        const int row = warp_row + i * 16 + lane % 16;
        const int col = inner + lane / 16 * 8;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fa[i][0]), "=r"(fa[i][1]), "=r"(fa[i][2]), "=r"(fa[i][3])
                     : "r"(shared(&tiles[0][step % kStages][row * kPitch + col])));
      }
      for (int j = 0; j < 4; j++) {
        const int row = warp_col + j * 8 + lane % 8;
        const int col = inner + lane / 8 % 2 * 8;
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(fb[j][0]), "=r"(fb[j][1])
                     : "r"(shared(&tiles[1][step % kStages][row * kPitch + col])));
      }
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
          float* s = sums[i][j];
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
              "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
              : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
              : "r"(fa[i][0]), "r"(fa[i][1]), "r"(fa[i][2]), "r"(fa[i][3]), "r"(fb[j][0]),
                "r"(fb[j][1]));
        }
    }
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int e = 0; e < 4; e++) {
        const int row = first_row + warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const int col = first_col + warp_col + j * 8 + lane % 4 * 2 + e % 2;
        if ((kMistake == MatmulMistake::kNoEdges || row < m) && col < n)
          c[int64_t{row} * n + col] = sums[i][j][e];
      }
}
template __global__ void matmul<MatmulMistake::kNone>(const __nv_bfloat16*, const __nv_bfloat16*,
                                                      float*, int, int, int);
template __global__ void matmul<MatmulMistake::kNoWait>(const __nv_bfloat16*, const __nv_bfloat16*,
                                                        float*, int, int, int);
template __global__ void matmul<MatmulMistake::kNoBarrier>(const __nv_bfloat16*,
                                                           const __nv_bfloat16*, float*, int, int,
                                                           int);
template __global__ void matmul<MatmulMistake::kNoEdges>(const __nv_bfloat16*, const __nv_bfloat16*,
                                                         float*, int, int, int);

// What nvcc makes calls, local memory, structs, constants and switches of.
struct Point {
  int a;
  double b;
  short c[3];
};

__constant__ int tens[4] = {10, 20, 30, 40};

__device__ __noinline__ int collatz_steps(int x) {
  int steps = 0;
  for (; x != 1; steps++) x = x % 2 ? 3 * x + 1 : x / 2;
  return steps;
}
__device__ __noinline__ Point make_point(int i, double b) {
  return {i, b, {short(i), short(2 * i), short(3 * i)}};
}

extern "C" __global__ void mixture(int* out, double* roots, Point p, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int local[16];
  for (int k = 0; k < 16; k++) local[k] = k * i;
  switch (i % 6) {
    case 0:
      out[i] = collatz_steps(i + 1);
      break;
    case 1:
      out[i] = local[i * 5 & 15];
      break;
    case 2:
      out[i] = p.c[i % 3];
      break;
    case 3:
      out[i] = __popc(i) + tens[i & 3];
      break;
    case 4: {
      const Point q = make_point(i, p.b);
      out[i] = q.c[1] + q.a;
      break;
    }
    default:
      out[i] = p.a;
  }
  roots[i] = p.b * i / 3.0 + sqrt(double(i));
}

extern "C" __global__ void asserts(const int* x) { assert(x[threadIdx.x] != 3); }
extern "C" __global__ void out_of_local(int* x, int k) {
  int local[8];
  for (int i = 0; i < 8; i++) local[i] = x[i];
  x[0] = local[k];
}
