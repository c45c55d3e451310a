// The tensor-core tile of a grouped matrix product, for sm_80 and later. Torch-free.
//
// 128 x 128 float32 sums per block of 4 warps, 64 x 64 in each, over float16 or bfloat16 operands
// that cp.async brings through 4 stages of 32 reduction steps. Shared memory is cut into 16-byte
// chunks, the unit of both cp.async and ldmatrix, and their places are permuted by XOR so that
// every group of 8 lanes touches all 32 banks once.
#pragma once
#include "csrc/common/grouped_tile.cuh"
#include "csrc/simt/mma.cuh"

namespace mergeme::grouped::sm80 {

inline constexpr int kSide = 128;  // rows and columns of a tile
inline constexpr int kThreads = 128;
inline constexpr int kDepth = 32;  // reduction steps of a stage
inline constexpr int kStages = 4;
inline constexpr int kChunkBytes = 16;
inline constexpr int kOperandBytes = kSide * kDepth * 2;
inline constexpr int kSharedBytes = kStages * 2 * kOperandBytes;
// Reductions are counted in 32 bits, with room to run past the end by all stages.
inline constexpr int64_t kMaxDepth = 2147483647 - kStages * kDepth;

// One warp's pieces of both operands for 16 reduction steps.
struct Fragments {
  uint32_t a[4][4];  // rows 16 i to 16 i + 15 of the warp's 64
  uint32_t b[4][4];  // columns 16 j to 16 j + 7 in the first two, the next 8 in the others
};

// An operand whose memory runs along the reduction: its stage is [128 rows, 4 chunks].
// A thread copies chunk threadIdx.x % 4 of four rows, 32 apart.
template <typename T>
struct DepthFirst {
  // The place in a stage of this thread's first chunk, and the distance of the others.
  __device__ static __forceinline__ int place() {
    const int chunk = threadIdx.x % 4, row = threadIdx.x / 4;
    return (row * 4 + (chunk ^ (row / 2 % 4))) * kChunkBytes;
  }
  static constexpr int kNext = 32 * 4 * kChunkBytes;

  // The warp's 64 rows from `first` on, as the left operand, at reduction steps 16 * half.
  __device__ static __forceinline__ void load_a(const char* stage, int first, int half,
                                                uint32_t (&a)[4][4]) {
    const int lane = simt::lane_id(), row = first + lane % 16, chunk = 2 * half + lane / 16;
    const char* from = stage + (row * 4 + (chunk ^ (row / 2 % 4))) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) simt::ldmatrix_x4(a[i], from + i * (16 * 4 * kChunkBytes));
  }
  // The same as the right operand.
  __device__ static __forceinline__ void load_b(const char* stage, int first, int half,
                                                uint32_t (&b)[4][4]) {
    const int lane = simt::lane_id(), row = first + lane % 8 + lane / 16 * 8;
    const int chunk = 2 * half + lane / 8 % 2;
    const char* from = stage + (row * 4 + (chunk ^ (row / 2 % 4))) * kChunkBytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) simt::ldmatrix_x4(b[j], from + j * (16 * 4 * kChunkBytes));
  }
};

// How many of a thread's four rows lie among the first `count` of the tile.
__device__ __forceinline__ int rows_of_thread(int count) {
  const int row = threadIdx.x / 4;
  return row < count ? (count - row + 31) / 32 : 0;
}

// Such an operand with evenly spaced rows: the thread's four rows begin at `from` and lie `spacing`
// elements apart. The first `count` of them exist.
template <typename T>
class EvenRows : public DepthFirst<T> {
 public:
  __device__ __forceinline__ EvenRows(int depth, const T* from, int64_t spacing, int count)
      : spacing_(spacing), count_(count), left_(depth - threadIdx.x % 4 * 8) {
    from_ = from + (count > 0 ? threadIdx.x % 4 * 8 : 0);
  }
  // Begins the copy of the next kDepth steps, zeros past the end of rows and reduction.
  __device__ __forceinline__ void copy(char* stage) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      simt::cp_async_16(stage + this->place() + i * this->kNext, from_ + i * spacing_,
                        i < count_ && left_ > 0);
    from_ += kDepth;
    left_ -= kDepth;
  }

 private:
  const T* from_;
  int64_t spacing_;
  int count_;
  int left_;  // reduction steps from this thread's chunk to the end
};

// Such an operand with rows anywhere: from(row) is the address of the tile's row, null for none.
template <typename T>
class AnyRows : public DepthFirst<T> {
 public:
  template <typename From>
  __device__ __forceinline__ AnyRows(int depth, From from) : left_(depth - threadIdx.x % 4 * 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows_[i] = from(threadIdx.x / 4 + 32 * i);
      if (rows_[i]) rows_[i] += threadIdx.x % 4 * 8;
    }
  }
  __device__ __forceinline__ void copy(char* stage) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      simt::cp_async_16(stage + this->place() + i * this->kNext, rows_[i], rows_[i] && left_ > 0);
      if (rows_[i]) rows_[i] += kDepth;
    }
    left_ -= kDepth;
  }

 private:
  const T* rows_[4];
  int left_;
};

// An operand whose memory runs across the reduction: its stage is [32 steps, 16 chunks of 8 rows].
// A thread copies chunk threadIdx.x % 16 of four steps, 8 apart.
template <typename T>
class DepthLast {
 public:
  // from: the tile's first row at the start of the reduction; count: rows from there to the end.
  __device__ __forceinline__ DepthLast(int depth, const T* from, int64_t ld, int count) : ld_(ld) {
    const int chunk = threadIdx.x % 16, step = threadIdx.x / 16;
    left_ = chunk * 8 < count ? depth - step : 0;
    from_ = from + (left_ > 0 ? step * ld + chunk * 8 : 0);
  }

  __device__ __forceinline__ void copy(char* stage) {
    const int chunk = threadIdx.x % 16, step = threadIdx.x / 16;
    char* to = stage + (step * 16 + (chunk ^ step % 8)) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      simt::cp_async_16(to + i * (8 * 16 * kChunkBytes), from_ + 8 * i * ld_, 8 * i < left_);
    from_ += kDepth * ld_;
    left_ -= kDepth;
  }

  __device__ static __forceinline__ void load_a(const char* stage, int first, int half,
                                                uint32_t (&a)[4][4]) {
    const int lane = simt::lane_id(), step = 16 * half + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = first / 8 + 2 * i + lane / 8 % 2;
      simt::ldmatrix_x4_trans(a[i], stage + (step * 16 + (chunk ^ step % 8)) * kChunkBytes);
    }
  }
  __device__ static __forceinline__ void load_b(const char* stage, int first, int half,
                                                uint32_t (&b)[4][4]) {
    const int lane = simt::lane_id(), step = 16 * half + lane % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int chunk = first / 8 + 2 * j + lane / 16;
      simt::ldmatrix_x4_trans(b[j], stage + (step * 16 + (chunk ^ step % 8)) * kChunkBytes);
    }
  }

 private:
  const T* from_;
  int64_t ld_;
  int left_;  // reduction steps from this thread's first to the end; none if it has no rows
};

// The warp's place in the tile.
__device__ __forceinline__ int warp_row() { return simt::warp_id() / 2 * 64; }
__device__ __forceinline__ int warp_column() { return simt::warp_id() % 2 * 64; }

// sum[i][j] are the mma results (see mma.cuh) of rows 16 i and columns 8 j of the warp's square.
// All threads of the block call this together, with shared memory free; on return it is free again.
template <typename T, typename A, typename B>
__device__ __forceinline__ void multiply_tile(char* shared, int depth, A& a, B& b,
                                              float (&sum)[4][8][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int l = 0; l < 4; ++l) sum[i][j][l] = 0;
  const int steps = static_cast<int>(ceil_div(depth, kDepth));
  if (steps == 0) return;
  const auto stage = [&](int step) { return shared + step % kStages * (2 * kOperandBytes); };
  // One group of copies for every step, empty past the end, so that waiting can count groups.
  const auto copy = [&](int step) {
    if (step < steps) {
      a.copy(stage(step));
      b.copy(stage(step) + kOperandBytes);
    }
    simt::cp_async_commit();
  };
  Fragments fragments[2];
  const auto load = [&](int step, int half) {
    A::load_a(stage(step), warp_row(), half, fragments[half].a);
    B::load_b(stage(step) + kOperandBytes, warp_column(), half, fragments[half].b);
  };
  const auto multiply = [&](const Fragments& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t pair[2] = {f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]};
        simt::mma_m16n8k16<T>(sum[i][j], f.a[i], pair);
      }
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  simt::cp_async_wait<kStages - 2>();
  __syncthreads();
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    load(step, 1);
    copy(step + kStages - 1);  // into the stage that all left at the last barrier
    multiply(fragments[0]);
    simt::cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + 1, 0);  // past the last step this reads an old stage, and nothing uses it
    multiply(fragments[1]);
  }
  simt::cp_async_wait<0>();
  __syncthreads();
}

// A tile of results on its way through shared memory, so that rows leave in whole 16-byte chunks.
template <typename Out, int kColumns>
class Staged {
 public:
  static constexpr int kPerChunk = kChunkBytes / int(sizeof(Out));
  static constexpr int kChunks = kColumns / kPerChunk;
  static_assert(kSide * kColumns * int(sizeof(Out)) <= kSharedBytes);

  __device__ explicit __forceinline__ Staged(char* shared) : shared_(shared) {}

  // Two neighbours, the first in an even column.
  __device__ __forceinline__ void put(int row, int column, float first, float second) {
    Out* to = reinterpret_cast<Out*>(shared_ + place(row, column / kPerChunk)) + column % kPerChunk;
    struct alignas(2 * sizeof(Out)) Pair {
      Out first, second;
    };
    *reinterpret_cast<Pair*>(to) = {from_acc<Out>(first), from_acc<Out>(second)};
  }

  // After a barrier: out[row, column] for the first `rows` and `columns` of the tile.
  __device__ __forceinline__ void copy_out(Out* out, int64_t ld, int rows, int columns) {
    struct alignas(kChunkBytes) Chunk {
      Out values[kPerChunk];
    };
    const bool whole = ld % kPerChunk == 0;  // then chunks are aligned and none straddles the end
    for (int i = threadIdx.x; i < kSide * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * kPerChunk;
      if (row >= rows || column >= columns) continue;
      const Chunk chunk = *reinterpret_cast<const Chunk*>(shared_ + place(row, i % kChunks));
      Out* to = out + row * ld + column;
      if (whole) {
        *reinterpret_cast<Chunk*>(to) = chunk;
      } else {
#pragma unroll
        for (int l = 0; l < kPerChunk; ++l)
          if (column + l < columns) to[l] = chunk.values[l];
      }
    }
  }

 private:
  // A warp writes 8 rows of one or two chunks at once, and reads whole rows.
  __device__ static __forceinline__ int place(int row, int chunk) {
    const int moved = sizeof(Out) == 2 ? row % 8 : row % 4 * 2;
    return (row * kChunks + (chunk ^ moved)) * kChunkBytes;
  }
  char* shared_;
};

// Row and column, within the warp's square, of a lane's first result in sum[i][j]; the second is
// its right neighbour, the other two lie 8 rows below.
__device__ __forceinline__ int lane_row() { return simt::lane_id() / 4; }
__device__ __forceinline__ int lane_column() { return simt::lane_id() % 4 * 2; }

// Writes the sums, each rounded once, to out[row, column].
template <typename Out>
__device__ __forceinline__ void store_tile(char* shared, const float (&sum)[4][8][4], Out* out,
                                           int64_t ld, int rows, int columns) {
  Staged<Out, kSide> staged(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int l = 0; l < 4; l += 2)
        staged.put(warp_row() + 16 * i + 4 * l + lane_row(), warp_column() + 8 * j + lane_column(),
                   sum[i][j][l], sum[i][j][l + 1]);
  __syncthreads();
  staged.copy_out(out, ld, rows, columns);
}

}  // namespace mergeme::grouped::sm80
