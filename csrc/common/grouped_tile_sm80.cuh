// The tensor-core tile of a grouped matrix product, for sm_80 and later. Torch-free.
//
// kRows x 128 float32 sums per block of 4 warps, over float16 or bfloat16 operands that cp.async
// brings through a ring of stages. Shared memory is cut into 16-byte chunks, the unit of both
// cp.async and ldmatrix, and their places are permuted by XOR so that every group of 8 lanes
// touches all 32 banks once.
#pragma once
#include "csrc/common/grouped_plan.cuh"
#include "csrc/common/grouped_tile.cuh"
#include "csrc/simt/mma.cuh"

namespace mergeme::grouped::sm80 {

inline constexpr int kColumns = 128;  // of a tile
inline constexpr int kThreads = 128;
inline constexpr int kBlocksPerSm = 2;  // what shared memory and registers are cut for
inline constexpr int kChunkBytes = 16;
// Reductions are counted in 32 bits, with room to run past the end by all stages.
inline constexpr int64_t kMaxDepth = 2147483647 - 512;

// Tiles of 128 rows are bound by the tensor cores: 64 x 64 sums in each warp. Those of 64, 32 and
// 16 rows are for experts with few tokens, whose products are bound by reading the weights: they
// reduce over whole 128-byte lines of them at a time.
template <int kRowsOfTile>
struct Shape {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kDepth = kRows == 128 ? 32 : 64;  // reduction steps of a stage
  static constexpr int kStages = kRows == 128 || kRows == 16 ? 4 : 3;
  static constexpr int kLeftBytes = kRows * kDepth * 2;
  static constexpr int kStageBytes = kLeftBytes + kColumns * kDepth * 2;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes + 32;  // and a tile's place
  // Two warps along the rows and two along the columns, or all four along the columns.
  static constexpr int kWarpsDown = kRows >= 64 ? 2 : 1;
  static constexpr int kWarpRows = kRows / kWarpsDown;
  static constexpr int kWarpColumns = kColumns * kWarpsDown / 4;
  static constexpr int kI = kWarpRows / 16;    // mma tiles of a warp along the rows
  static constexpr int kJ = kWarpColumns / 8;  // and along the columns
  static_assert(kRows == 16 || kRows == 32 || kRows == 64 || kRows == 128);
  static_assert(kRows * kColumns * 4 <= kRingBytes);  // the sums pass through it

  using Sums = float[kI][kJ][4];

  // The warp's place in the tile.
  __device__ static __forceinline__ int warp_row() {
    return simt::warp_id() % kWarpsDown * kWarpRows;
  }
  __device__ static __forceinline__ int warp_column() {
    return simt::warp_id() / kWarpsDown * kWarpColumns;
  }
};

// Calls fn.template operator()<kRows>() with room in a tile for twice the average number of an
// expert's rows, so that most experts need one tile and their weights are read once.
template <typename F>
void dispatch_height(int64_t rows, int64_t num_experts, F&& fn) {
  const int64_t twice = 2 * rows / num_experts;
  if (twice <= 16) return fn.template operator()<16>();
  if (twice <= 32) return fn.template operator()<32>();
  if (twice <= 64) return fn.template operator()<64>();
  fn.template operator()<128>();
}

// One register less than 64 bits, and one wide multiply-add for each address: rows of an operand
// have at most kMaxDepth elements.
template <typename T>
MERGEME_HD uint32_t bytes_of_row(int64_t row) {
  return static_cast<uint32_t>(row * int64_t{sizeof(T)});
}

// An operand whose memory runs along the reduction: its stage is [kSide rows, kDepth / 8 chunks]. A
// thread copies the same chunk of kPasses rows, kSpread apart.
template <typename T, int kSide, int kDepth>
struct DepthFirst {
  static constexpr int kChunks = kDepth / 8;
  static constexpr int kSpread = kThreads / kChunks;
  static constexpr int kPasses = kSide / kSpread;
  static_assert(kPasses >= 1);

  // The thread's first row of the tile, and its chunk's first reduction step.
  __device__ static __forceinline__ int own_row() { return threadIdx.x / kChunks; }
  __device__ static __forceinline__ int own_step() { return threadIdx.x % kChunks * 8; }

  __device__ static __forceinline__ int place(int row, int chunk) {
    const int moved = kChunks == 4 ? row / 2 % 4 : row % 8;
    return (row * kChunks + (chunk ^ moved)) * kChunkBytes;
  }
  // Where this thread's pass-th chunk goes. Rows kSpread apart are moved alike.
  __device__ static __forceinline__ int own_place(int pass) {
    return place(own_row(), threadIdx.x % kChunks) + pass * (kSpread * kChunks * kChunkBytes);
  }

  // Of kSide rows, `count` exist; how many of them are this thread's.
  __device__ static __forceinline__ int own_count(int count) {
    const int row = own_row();
    return row < count ? (count - row + kSpread - 1) / kSpread : 0;
  }

  // Where in a stage this lane's part of a row of matrices begins, `first` being the warp's first
  // row, as the left and as the right operand.
  __device__ static __forceinline__ int base_a(int first) {
    return place(first + simt::lane_id() % 16, simt::lane_id() / 16);
  }
  __device__ static __forceinline__ int base_b(int first) {
    return place(first + simt::lane_id() % 8 + simt::lane_id() / 16 * 8, simt::lane_id() / 8 % 2);
  }
  // Loads 16 kCount rows at reduction steps 16 * part; `base` includes the stage's offset, a
  // multiple of 128. The two chunks of a part lie an XOR away from those of part 0.
  template <int kCount>
  __device__ static __forceinline__ void load_a(const char* shared, int base, int part,
                                                uint32_t (&to)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      simt::ldmatrix_x4(
          to[i], shared + (base ^ 2 * part * kChunkBytes) + i * (16 * kChunks * kChunkBytes));
  }
  template <int kCount>
  __device__ static __forceinline__ void load_b(const char* shared, int base, int part,
                                                uint32_t (&to)[kCount][4]) {
    load_a(shared, base, part, to);
  }
};

// Such an operand with evenly spaced rows of `row` elements: the thread's rows begin at `from` and
// lie kApart rows apart. The first `count` of them exist.
template <typename T, int kSide, int kDepth, int kApart = DepthFirst<T, kSide, kDepth>::kSpread>
class EvenRows : public DepthFirst<T, kSide, kDepth> {
 public:
  __device__ __forceinline__ EvenRows(int depth, const T* from, int64_t row, int count)
      : row_bytes_(bytes_of_row<T>(row)), count_(count), left_(depth - this->own_step()) {
    from_ = reinterpret_cast<const char*>(from + (count > 0 ? this->own_step() : 0));
  }
  // Begins the copy of the next kDepth steps, zeros past the end of rows and reduction.
  __device__ __forceinline__ void copy(char* stage) {
#pragma unroll
    for (int i = 0; i < this->kPasses; ++i)
      simt::cp_async_16(stage + this->own_place(i), from_ + uint64_t{row_bytes_} * (i * kApart),
                        i < count_ && left_ > 0);
    from_ += kDepth * sizeof(T);
    left_ -= kDepth;
  }

 private:
  const char* from_;
  uint32_t row_bytes_;
  int count_;
  int left_;  // reduction steps from this thread's chunk to the end
};

// Such an operand with rows anywhere: from(row) is the address of the tile's row, null for none.
template <typename T, int kSide, int kDepth>
class AnyRows : public DepthFirst<T, kSide, kDepth> {
 public:
  template <typename From>
  __device__ __forceinline__ AnyRows(int depth, From from) : left_(depth - this->own_step()) {
#pragma unroll
    for (int i = 0; i < this->kPasses; ++i) {
      rows_[i] = from(this->own_row() + i * this->kSpread);
      if (rows_[i]) rows_[i] += this->own_step();
    }
  }
  __device__ __forceinline__ void copy(char* stage) {
#pragma unroll
    for (int i = 0; i < this->kPasses; ++i) {
      simt::cp_async_16(stage + this->own_place(i), rows_[i], rows_[i] && left_ > 0);
      if (rows_[i]) rows_[i] += kDepth;
    }
    left_ -= kDepth;
  }

 private:
  const T* rows_[DepthFirst<T, kSide, kDepth>::kPasses];
  int left_;
};

// An operand whose memory runs across the reduction: its stage is [kDepth steps, 16 chunks of 8
// rows]. A thread copies chunk threadIdx.x % 16 of every eighth step.
struct DepthLast {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kSpread = kThreads / kChunks;

  __device__ static __forceinline__ int own_row() { return threadIdx.x % kChunks * 8; }
  __device__ static __forceinline__ int own_step() { return threadIdx.x / kChunks; }
  __device__ static __forceinline__ int place(int step, int chunk) {
    return (step * kChunks + (chunk ^ step % 8)) * kChunkBytes;
  }
  __device__ static __forceinline__ int own_place(int pass) {
    return place(own_step(), threadIdx.x % kChunks) + pass * (kSpread * kChunks * kChunkBytes);
  }

  // As those of DepthFirst, `first` being a multiple of 64 or no more than 32 rows being loaded:
  // here 16 rows on lie an XOR away.
  __device__ static __forceinline__ int base_a(int first) {
    const int lane = simt::lane_id();
    return place(lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2);
  }
  __device__ static __forceinline__ int base_b(int first) {
    return place(simt::lane_id() % 16, first / 8 + simt::lane_id() / 16);
  }
  template <int kCount>
  __device__ static __forceinline__ void load_a(const char* shared, int base, int part,
                                                uint32_t (&to)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      simt::ldmatrix_x4_trans(
          to[i], shared + (base ^ 2 * i * kChunkBytes) + part * (16 * kChunks * kChunkBytes));
  }
  template <int kCount>
  __device__ static __forceinline__ void load_b(const char* shared, int base, int part,
                                                uint32_t (&to)[kCount][4]) {
    load_a(shared, base, part, to);
  }
};

// Such an operand with evenly spaced steps of `step` elements. `from` is the tile's first row at
// the start of the reduction; `count` rows exist from there on.
template <typename T, int kDepth>
class EvenSteps : public DepthLast {
 public:
  __device__ __forceinline__ EvenSteps(int depth, const T* from, int64_t step, int count)
      : row_bytes_(bytes_of_row<T>(step)) {
    left_ = own_row() < count ? depth - own_step() : 0;
    from_ = reinterpret_cast<const char*>(from + (left_ > 0 ? own_step() * step + own_row() : 0));
  }
  __device__ __forceinline__ void copy(char* stage) {
#pragma unroll
    for (int i = 0; i < kDepth / kSpread; ++i)
      simt::cp_async_16(stage + own_place(i), from_ + uint64_t{row_bytes_} * (i * kSpread),
                        kSpread * i < left_);
    from_ += uint64_t{row_bytes_} * kDepth;
    left_ -= kDepth;
  }

 private:
  const char* from_;
  uint32_t row_bytes_;
  int left_;  // reduction steps from this thread's first to the end; none if it has no rows
};

// Such an operand whose steps are rows of a matrix in any order: those that the `depth` indices
// before index[end] name. The indices of a stage are read one stage ahead, so that their latency is
// covered by a stage of products, one by each lane: the 16 lanes that copy a step share them.
template <typename T, int kDepth>
class AnySteps : public DepthLast {
 public:
  __device__ __forceinline__ AnySteps(int depth, const T* from, const int32_t* index, int end,
                                      int64_t row, int count)
      : exists_(own_row() < count),
        left_(depth - own_step()),
        index_(index),
        end_(end),
        row_bytes_(bytes_of_row<T>(row)) {
    from_ = reinterpret_cast<const char*>(from + (exists_ ? own_row() : 0));
    if (depth > 0) read();
  }
  __device__ __forceinline__ void copy(char* stage) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t row = __shfl_sync(simt::kFullWarp, next_, i, kChunks);
      simt::cp_async_16(stage + own_place(i), from_ + uint64_t{row} * row_bytes_,
                        exists_ && kSpread * i < left_);
    }
    left_ -= kDepth;
    read();
  }

 private:
  static constexpr int kPasses = kDepth / kSpread;
  static_assert(kPasses <= kChunks);
  // Past the end the last index again, so that no branch stands between copies and products.
  __device__ __forceinline__ void read() {
    const int place = threadIdx.x % kPasses * kSpread - left_;
    next_ = static_cast<uint32_t>(index_[end_ + (place < 0 ? place : -1)]);
  }
  bool exists_;
  int left_;  // reduction steps from this thread's next to the end
  const char* from_;
  const int32_t* index_;
  int end_;
  uint32_t row_bytes_;
  uint32_t next_;
};

// Steps through the stages of the ring.
template <typename Shape>
struct Ring {
  int at;  // byte offset of the stage
  __device__ __forceinline__ void next() {
    at += Shape::kStageBytes;
    if (at == Shape::kRingBytes) at = 0;
  }
};

// sum[i][j] are the mma results (see mma.cuh) of rows 16 i and columns 8 j of the warp's part. All
// threads of the block call this together, with shared memory free; on return it is free again.
template <typename T, typename Shape, typename A, typename B>
__device__ __forceinline__ void multiply_tile(char* shared, int depth, A& a, B& b,
                                              typename Shape::Sums& sum) {
  constexpr int kI = Shape::kI, kJ = Shape::kJ, kParts = Shape::kDepth / 16;
#pragma unroll
  for (int i = 0; i < kI; ++i)
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
      for (int l = 0; l < 4; ++l) sum[i][j][l] = 0;
  const int steps = (depth + Shape::kDepth - 1) / Shape::kDepth;
  if (steps == 0) return;
  // One group of copies for every step, so that waiting can count groups; past the end of zeros.
  Ring<Shape> copied{0}, loaded{0};
  const auto copy = [&] {
    a.copy(shared + copied.at);
    b.copy(shared + copied.at + Shape::kLeftBytes);
    simt::cp_async_commit();
    copied.next();
  };
  // A warp's pieces of both operands for 16 reduction steps, loaded one part ahead of their use.
  struct {
    uint32_t a[kI][4];      // rows 16 i to 16 i + 15
    uint32_t b[kJ / 2][4];  // columns 16 j to 16 j + 7 in the first two, the next 8 in the others
  } fragments[2];
  const int base_a = A::base_a(Shape::warp_row());
  const int base_b = Shape::kLeftBytes + B::base_b(Shape::warp_column());
  const auto load = [&](int part) {
    A::load_a(shared, loaded.at + base_a, part, fragments[part % 2].a);
    B::load_b(shared, loaded.at + base_b, part, fragments[part % 2].b);
  };

#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) copy();
  simt::cp_async_wait<Shape::kStages - 2>();
  __syncthreads();
  load(0);
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part + 1 < kParts) {
        load(part + 1);
      } else {
        simt::cp_async_wait<Shape::kStages - 2>();
        __syncthreads();
        loaded.next();
        load(0);  // past the last step this reads an old stage, and nothing uses it
      }
      // Into the stage that all left at the last barrier.
      if (part == 0) copy();
#pragma unroll
      for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          const auto& f = fragments[part % 2];
          const uint32_t pair[2] = {f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]};
          simt::mma_m16n8k16<T>(sum[i][j], f.a[i], pair);
        }
    }
  }
  simt::cp_async_wait<0>();  // the zeros must not land on what is written next
  __syncthreads();
}

// A tile of results on its way through shared memory, so that rows leave in whole 16-byte chunks.
template <typename Out, typename Shape>
class Staged {
 public:
  static constexpr int kPerChunk = kChunkBytes / int(sizeof(Out));
  static constexpr int kChunks = kColumns / kPerChunk;
  static_assert(Shape::kRows * kColumns * int(sizeof(Out)) <= Shape::kRingBytes);

  struct alignas(kChunkBytes) Chunk {
    Out values[kPerChunk];
  };

  // The sums, each rounded once; a barrier must follow.
  __device__ __forceinline__ Staged(char* shared, const typename Shape::Sums& sum)
      : shared_(shared) {
    // A lane's first result in sum[i][j]; the second is its right neighbour, the other two lie 8
    // rows below.
    const int row = Shape::warp_row() + simt::lane_id() / 4;
    const int column = Shape::warp_column() + simt::lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < Shape::kI; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kJ; ++j)
#pragma unroll
        for (int l = 0; l < 4; l += 2)
          put(row + 16 * i + 4 * l, column + 8 * j, sum[i][j][l], sum[i][j][l + 1]);
  }

  __device__ __forceinline__ Chunk chunk(int row, int number) const {
    return *reinterpret_cast<const Chunk*>(shared_ + place(row, number));
  }

  // out[row, column] for the first `rows` and `columns` of the tile.
  __device__ __forceinline__ void copy_out(Out* out, int64_t ld, int rows, int columns) const {
    const bool whole = ld % kPerChunk == 0;  // then chunks are aligned and none straddles the end
    for (int i = threadIdx.x; i < Shape::kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * kPerChunk;
      if (row >= rows || column >= columns) continue;
      const Chunk values = chunk(row, i % kChunks);
      Out* to = out + row * ld + column;
      if (whole) {
        *reinterpret_cast<Chunk*>(to) = values;
      } else {
#pragma unroll
        for (int l = 0; l < kPerChunk; ++l)
          if (column + l < columns) to[l] = values.values[l];
      }
    }
  }

 private:
  // Two neighbours, the first in an even column.
  __device__ __forceinline__ void put(int row, int column, float first, float second) {
    char* to = shared_ + place(row, column / kPerChunk) + column % kPerChunk * int(sizeof(Out));
    if constexpr (sizeof(Out) == 4)
      *reinterpret_cast<float2*>(to) = float2{first, second};
    else
      *reinterpret_cast<uint32_t*>(to) = simt::round_pair<Out>(first, second);
  }

  // A warp writes 8 rows of one or two chunks at once. It reads whole rows or, of floats, every
  // second or fourth chunk of a row: there the upper bits of the chunk's number move it too.
  __device__ static __forceinline__ int place(int row, int number) {
    const int moved = sizeof(Out) == 2 ? row % 8 : row % 4 * 2 ^ number / 8 % 4;
    return (row * kChunks + (number ^ moved)) * kChunkBytes;
  }
  char* shared_;
};

// A tile's place, in shared memory while its products take all registers; to be read after them.
template <typename Shape, typename T>
__device__ __forceinline__ const T* keep(char* shared, const T& tile) {
  static_assert(sizeof(T) <= Shape::kSharedBytes - Shape::kRingBytes);
  T* kept = reinterpret_cast<T*>(shared + Shape::kRingBytes);
  if (threadIdx.x == 0) *kept = tile;
  return kept;
}

// One tile of out[m, n] = sum_k a[m, k] b[e, n, k] (kNt) or ... b[e, k, n] for the rows m of expert
// e; a is [M, k], out [M, n]. Zeros for the rows of no expert.
template <typename Shape, bool kNt, typename T, typename Out>
__device__ __forceinline__ void multiply_rows(char* shared, const Tile& tile, const T* a,
                                              const T* b, Out* out, int64_t k, int64_t n,
                                              int num_experts) {
  constexpr int kDepth = Shape::kDepth;
  using Left = EvenRows<T, Shape::kRows, kDepth>;
  const bool owned = tile.group < num_experts;
  const int64_t expert = owned ? tile.group : 0;
  const int depth = owned ? static_cast<int>(k) : 0;
  const int rows = clamp_left(tile.end - tile.row, Shape::kRows);
  const int columns = clamp_left(n - tile.column, kColumns);
  const int row = Left::own_row();
  const Tile* kept = keep<Shape>(shared, tile);
  Left left(depth, a + (tile.row + (row < rows ? row : 0)) * k, k, Left::own_count(rows));
  typename Shape::Sums sum;
  if constexpr (kNt) {
    using Right = EvenRows<T, kColumns, kDepth>;
    const int column = Right::own_row();
    Right right(depth, b + (expert * n + tile.column + (column < columns ? column : 0)) * k, k,
                Right::own_count(columns));
    multiply_tile<T, Shape>(shared, depth, left, right, sum);
  } else {
    EvenSteps<T, kDepth> right(depth, b + expert * k * n + tile.column, n, columns);
    multiply_tile<T, Shape>(shared, depth, left, right, sum);
  }
  const Staged<Out, Shape> staged(shared, sum);
  __syncthreads();
  const Tile place = *kept;
  staged.copy_out(out + place.row * n + place.column, n,
                  clamp_left(place.end - place.row, Shape::kRows),
                  clamp_left(n - place.column, kColumns));
  __syncthreads();  // shared memory is free for the next tile
}

// One tile of out[e, i, j] = sum over the rows m of expert e of left(m, i) right(m, j). make_left
// and make_right give the operands, out is [E, n1, n2].
template <typename Shape, typename T, typename MakeLeft, typename MakeRight>
__device__ __forceinline__ void multiply_sums(char* shared, const SumTile& tile, T* out, int64_t n1,
                                              int64_t n2, MakeLeft make_left,
                                              MakeRight make_right) {
  const int rows = clamp_left(n1 - tile.row, Shape::kRows);
  const int columns = clamp_left(n2 - tile.column, kColumns);
  const int depth = tile.end - tile.begin;
  auto left = make_left(depth, rows);
  auto right = make_right(depth, columns);
  const SumTile* kept = keep<Shape>(shared, tile);
  typename Shape::Sums sum;
  multiply_tile<T, Shape>(shared, depth, left, right, sum);
  const Staged<T, Shape> staged(shared, sum);
  __syncthreads();
  const SumTile place = *kept;
  staged.copy_out(out + (place.expert * n1 + place.row) * n2 + place.column, n2,
                  clamp_left(n1 - place.row, Shape::kRows),
                  clamp_left(n2 - place.column, kColumns));
  __syncthreads();  // shared memory is free for the next tile
}

}  // namespace mergeme::grouped::sm80
