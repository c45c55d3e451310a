// The tile of a grouped matrix product on the tensor cores of sm_90. Torch-free.
//
// A block is three warpgroups. The first brings 64 reduction steps (128 of e4m3) of both operands
// at a time into a ring of stages, weights and evenly spaced rows as boxes of a tensor map, rows in
// any order as 16-byte chunks; the other two multiply. Two mbarriers for each stage say when it is
// full and when it is empty again. Everything is under the 128-byte swizzle (simt/wgmma.cuh). The
// kernels exist on sm_90a only: elsewhere, and on the host shim, their bodies are empty.
#pragma once
#include <type_traits>
#include <utility>

#include "csrc/common/grouped_plan.cuh"
#include "csrc/common/grouped_tile.cuh"
#include "csrc/simt/tensor_copy.cuh"
#include "csrc/simt/wgmma.cuh"

namespace mergeme::grouped::sm90 {

inline constexpr int kGroupThreads = 128;
inline constexpr int kThreads = 3 * kGroupThreads;
inline constexpr int kDepth = 64;                        // reduction steps of a stage, 16-bit types
inline constexpr int kLineBytes = 128;                   // of the swizzle
inline constexpr int kBlockBytes = kDepth * kLineBytes;  // 64 rows or columns of a stage
template <typename T>
inline constexpr int kDepthOf = kLineBytes / int(sizeof(T));
inline constexpr int kSharedBytes = 227 * 1024;  // all that a block can have
inline constexpr int kPatchBytes = 4096;         // a math warp's own, for results
inline constexpr int kRingAlignment = 1024;
// Rows, columns and reductions are counted in 32 bits, with room to run past the end.
inline constexpr int64_t kMaxSide = 2147483647 - 512;

// Two math warpgroups share a tile, or (kGroups 1) each has its own and one stores while the other
// multiplies. A math warpgroup has kBlocks times 64 rows of its tile, and at most 128 sums in each
// thread. Blocks of a cluster have tiles one below the other, and each brings its part of the right
// operand to all of them.
template <int kRowsOfTile, int kColumnsOfTile, int kGroupsOfTile, int kClusterBlocks = 1>
struct Shape {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr int kGroups = kGroupsOfTile;
  static constexpr int kCluster = kClusterBlocks;
  static constexpr int kHeight = kRows * kCluster;  // of the tiles that are planned
  static constexpr int kBlocks = kRows / kGroups / 64;
  static constexpr int kLeftBytes = kRows * kLineBytes;
  static constexpr int kStageBytes = kLeftBytes + kColumns * kLineBytes;
  static constexpr int kPatches = kRingAlignment + 8 * kPatchBytes + 256;  // and barriers
  static constexpr int kStages = (kSharedBytes - kPatches) / kStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static_assert(kGroups == 1 || kGroups == 2);
  static_assert(kRows % (64 * kGroups) == 0 && kBlocks * kColumns <= 256);
  static_assert((2 * kStages + 2) * 8 <= 256);

  using Sums = float[kBlocks][kColumns / 2];
};
using Shared = Shape<128, 256, 2>;  // for long reductions: the least traffic
using Turns = Shape<128, 128, 1>;   // for short ones, whose results would keep tensor cores waiting
using Low = Shape<64, 256, 1>;      // for experts with few rows
using Pair = Shape<128, 256, 2, 2>;  // for those of experts with many rows: still less traffic
inline constexpr int64_t kShortDepth = 1024;

// Experts with so few rows on average are bound by reading the weights, and the tiles of 16 and 32
// rows of sm_80 waste less.
inline bool has_enough_rows(int64_t rows, int64_t num_experts) {
  return 2 * rows > 32 * num_experts;
}

// Calls fn.template operator()<Shape>() with the shape to use for reductions of about this length.
template <typename F>
void dispatch_depth(int64_t depth, F&& fn) {
  if (depth <= kShortDepth) return fn.template operator()<Turns>();
  fn.template operator()<Shared>();
}
// The same for planned tiles of kHeight rows.
template <int kHeight, typename F>
void dispatch_shape(int64_t depth, F&& fn) {
  if constexpr (kHeight == Low::kHeight)
    fn.template operator()<Low>();
  else if constexpr (kHeight == Pair::kHeight)
    fn.template operator()<Pair>();
  else
    dispatch_depth(depth, fn);
}

// Calls fn.template operator()<kHeight>() with the height of planned tiles: room for twice the
// average number of an expert's rows, or where that fills pairs of tiles and `depth`, the shortest
// reduction, is long, pairs.
template <typename F>
void dispatch_height(int64_t rows, int64_t num_experts, int64_t depth, F&& fn) {
  if (2 * rows <= Low::kHeight * num_experts) return fn.template operator()<Low::kHeight>();
  if (rows >= Pair::kHeight * num_experts && depth > kShortDepth)
    return fn.template operator()<Pair::kHeight>();
  fn.template operator()<Shared::kHeight>();
}

// A kernel's Params with the maps of both operands; one that is gathered has none.
template <typename Params>
struct WithMaps : Params {
  simt::TensorMap a_map = {};
  simt::TensorMap b_map = {};
};

template <typename Shape>
simt::LaunchConfig config(void* stream) {
  return {.block = kThreads,
          .shared_bytes = kSharedBytes,
          .stream = stream,
          .cluster = Shape::kCluster};
}

// The map of an operand's memory, [matrices, rows, columns], columns running fastest: boxes of
// kDepth columns by `side` rows where columns are reduced over, else of 64 columns by kDepth rows.
template <typename T>
simt::TensorMap map_of(const char* name, const void* data, int64_t matrices, int64_t rows,
                       int64_t columns, simt::Run run, int side) {
  const int64_t row_bytes = columns * int64_t{sizeof(T)};
  return simt::make_tensor_map(
      name, {.data = data,
             .element_bytes = sizeof(T),
             .sizes = {columns, rows, matrices},
             .strides = {row_bytes, rows * row_bytes},
             .box = {kLineBytes / int(sizeof(T)), run == simt::Run::kDepth ? side : kDepth}});
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using simt::Run;
using simt::SharedAddress;

// The operands. kBytes of a stage come as boxes, begun by one thread; a gathered operand comes from
// all threads of the warpgroup. If it runs on, a stage that the reduction fills in part holds what
// follows in memory, and what multiplies must clear it.

// Begins the copy of an operand's boxes, to the block or in turns with the others of the cluster to
// all of them.
template <int kCluster>
struct Boxes {
  SharedAddress barrier;
  uint32_t rank;

  __device__ __forceinline__ void copy(uint32_t number, SharedAddress to,
                                       const simt::TensorMap* map, int x, int y, int z) const {
    if constexpr (kCluster == 1)
      simt::copy_box(to, map, x, y, z, barrier);
    else if (number % kCluster == rank)
      simt::copy_box_to((1 << kCluster) - 1, to, map, x, y, z, barrier);
  }
};

// kSide rows from `row` on of a matrix whose memory runs along the reduction, kSteps of it in a
// stage, in kCount boxes. Past its end, and past the end of rows, zeros.
template <int kSide, int kCount = 1, int kSteps = kDepth>
struct Rows {
  static constexpr Run kRun = Run::kDepth;
  static constexpr int kBytes = kSide * kLineBytes;
  static constexpr bool kGathered = false, kRunsOn = false;
  const simt::TensorMap* map;
  int matrix, row;

  template <typename Boxes>
  __device__ __forceinline__ void copy(SharedAddress to, int step, const Boxes& boxes) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      boxes.copy(i, to + i * (kBytes / kCount), map, step * kSteps, row + i * (kSide / kCount),
                 matrix);
  }
};

// Half of them from `row` on, half from `other` on.
template <int kSide, int kSteps = kDepth>
struct RowPairs {
  static constexpr Run kRun = Run::kDepth;
  static constexpr int kBytes = kSide * kLineBytes;
  static constexpr bool kGathered = false, kRunsOn = false;
  const simt::TensorMap* map;
  int matrix, row, other;

  template <typename Boxes>
  __device__ __forceinline__ void copy(SharedAddress to, int step, const Boxes& boxes) const {
    boxes.copy(0, to, map, step * kSteps, row, matrix);
    boxes.copy(1, to + kBytes / 2, map, step * kSteps, other, matrix);
  }
};

// kSide columns from `column` on of a matrix whose rows are reduced over, from row `begin` on.
template <int kSide, bool kPartOfMatrix>
struct Steps {
  static constexpr Run kRun = Run::kAcross;
  static constexpr int kBytes = kSide * kLineBytes;
  static constexpr bool kGathered = false, kRunsOn = kPartOfMatrix;
  const simt::TensorMap* map;
  int matrix, begin, column;

  template <typename Boxes>
  __device__ __forceinline__ void copy(SharedAddress to, int step, const Boxes& boxes) const {
#pragma unroll
    for (int i = 0; i < kSide / 64; ++i)
      boxes.copy(i, to + i * kBlockBytes, map, column + 64 * i, begin + step * kDepth, matrix);
  }
};

// Where chunk `chunk` of a row of 128 bytes lies.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kLineBytes + (chunk ^ row % 8) * 16;
}

// Rows anywhere, whose memory runs along the reduction: from(row) is the address of the tile's row,
// null for none. A thread copies the same chunk of every sixteenth row.
template <typename T, int kSide>
class AnyRows {
 public:
  static constexpr Run kRun = Run::kDepth;
  static constexpr int kBytes = 0;
  static constexpr bool kGathered = true, kRunsOn = false;

  template <typename From>
  __device__ __forceinline__ AnyRows(int depth, From from) : left_(depth - own_step()) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      rows_[i] = from(own_row() + 16 * i);
      if (rows_[i]) rows_[i] += own_step();
    }
  }
  __device__ __forceinline__ void gather(char* to, int) {
    to += swizzled(own_row(), threadIdx.x % 8);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      simt::cp_async_16(to + 16 * i * kLineBytes, rows_[i], rows_[i] && left_ > 0);
      if (rows_[i]) rows_[i] += kDepthOf<T>;
    }
    left_ -= kDepthOf<T>;
  }

 private:
  static constexpr int kPasses = kSide / 16;
  __device__ static __forceinline__ int own_row() { return threadIdx.x % kGroupThreads / 8; }
  __device__ static __forceinline__ int own_step() {
    return threadIdx.x % 8 * (16 / int(sizeof(T)));
  }
  const T* rows_[kPasses];
  int left_;  // reduction steps from this thread's chunk to the end
};

// Steps that are rows of a matrix in any order: those that the `depth` indices from `index` on
// name, and of them kSide columns from `column` on, of which `count` exist. The indices of a stage
// are read one stage ahead.
template <typename T, int kSide>
class AnySteps {
 public:
  static constexpr Run kRun = Run::kAcross;
  static constexpr int kBytes = 0;
  static constexpr bool kGathered = true, kRunsOn = false;

  __device__ __forceinline__ AnySteps(int depth, const T* from, const int32_t* index, int64_t row,
                                      int count)
      : from_(from + own_column()),
        index_(index),
        row_(row),
        left_(depth - own_step()),
        count_(count - own_column()) {
    read();
  }
  __device__ __forceinline__ void gather(char* to, int) {
    to += swizzled(own_step(), threadIdx.x % 8);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const T* row = from_ + next_[i] * row_;
#pragma unroll
      for (int j = 0; j < kSide / 64; ++j) {
        const bool exists = 16 * i < left_ && 64 * j < count_;
        simt::cp_async_16(to + j * kBlockBytes + 16 * i * kLineBytes, exists ? row + 64 * j : from_,
                          exists);
      }
    }
    left_ -= kDepth;
    index_ += kDepth;
    read();
  }

 private:
  static constexpr int kPasses = kDepth / 16;
  __device__ static __forceinline__ int own_step() { return threadIdx.x % kGroupThreads / 8; }
  __device__ static __forceinline__ int own_column() { return threadIdx.x % 8 * 8; }
  __device__ __forceinline__ void read() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) next_[i] = 16 * i < left_ ? index_[own_step() + 16 * i] : 0;
  }
  const T* from_;
  const int32_t* index_;
  int64_t row_;
  int left_;   // reduction steps from this thread's first to the end
  int count_;  // columns from this thread's first to the end
  int32_t next_[kPasses];
};

template <typename LeftOperand, typename RightOperand>
struct Operands {
  using Left = LeftOperand;
  using Right = RightOperand;
  Left left;
  Right right;
};
template <typename Left, typename Right>
Operands(Left, Right) -> Operands<Left, Right>;

// The ring: where a warpgroup is in it, and the barriers.
template <typename Shape>
class Ring {
 public:
  // All threads of the block make it, `arrivals` being what fills a stage; then they pass a
  // barrier.
  __device__ __forceinline__ Ring(char* shared, uint32_t arrivals)
      : bytes_(shared + static_cast<uint32_t>(-simt::shared_address(shared)) % kRingAlignment) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Shape::kStages; ++stage) {
        simt::mbarrier_init(barriers() + 8 * stage, arrivals);
        simt::mbarrier_init(empty(stage), 4 * Shape::kGroups * Shape::kCluster);
      }
      for (int group = 0; group < 2; ++group) simt::mbarrier_init(turn(group), 4);
      simt::fence_mbarrier_init();
    }
    if constexpr (Shape::kCluster > 1)
      simt::sync_cluster();
    else
      __syncthreads();
  }

  __device__ __forceinline__ char* patch(int warp) const {
    return bytes_ + Shape::kRingBytes + warp * kPatchBytes;
  }
  __device__ __forceinline__ char* stage() const { return bytes_ + at_ * Shape::kStageBytes; }
  __device__ __forceinline__ int at() const { return at_; }
  __device__ __forceinline__ SharedAddress address() const { return simt::shared_address(bytes_); }
  __device__ __forceinline__ SharedAddress full() const { return barriers() + 8 * at_; }
  __device__ __forceinline__ SharedAddress empty(int at) const {
    return barriers() + 8 * (Shape::kStages + at);
  }
  // Where math warpgroups take turns: before its `number`-th tile a group waits until the other is
  // through with the tile before. So no one waits for a stage before all that filled it earlier is
  // known to have been there, and the parity of a phase is enough to tell it by.
  __device__ __forceinline__ void wait_turn(int group, int number) const {
    simt::mbarrier_wait(turn(group ^ 1), (number ^ group ^ 1) & 1);
  }
  __device__ __forceinline__ SharedAddress turn(int group) const {
    return barriers() + 8 * (2 * Shape::kStages + group);
  }
  __device__ __forceinline__ void wait_full() const { simt::mbarrier_wait(full(), parity_); }
  __device__ __forceinline__ void wait_empty() const {
    simt::mbarrier_wait(empty(at_), parity_ ^ 1);  // the first time around at once
  }
  // Gives a stage back, to all blocks that bring something to it. By one warp.
  __device__ __forceinline__ void release(int at) const {
    const uint32_t lane = simt::lane_id();
    if constexpr (Shape::kCluster == 1) {
      if (lane == 0) simt::mbarrier_arrive(empty(at));
    } else {
      if (lane < Shape::kCluster) simt::mbarrier_arrive_at(empty(at), lane);
    }
  }
  __device__ __forceinline__ void next() {
    if (++at_ == Shape::kStages) at_ = 0, parity_ ^= 1;
  }
  // Past the stages of a tile that another warpgroup multiplies.
  __device__ __forceinline__ void skip(int steps) {
    const uint32_t on = static_cast<uint32_t>(at_ + steps);
    parity_ ^= on / Shape::kStages % 2;
    at_ = static_cast<int>(on % Shape::kStages);
  }

 private:
  __device__ __forceinline__ SharedAddress barriers() const {
    return address() + Shape::kRingBytes + 8 * kPatchBytes;
  }
  char* bytes_;
  int at_ = 0;
  uint32_t parity_ = 0;
};

template <typename T>
__device__ __forceinline__ int steps_of(int depth) {
  return (depth + kDepthOf<T> - 1) / kDepthOf<T>;
}

// Clears the steps from `first` on in kBytes of a stage. One of threads number 0 to `threads`.
template <int kBytes>
__device__ __forceinline__ void clear_steps(char* stage, int first, int thread, int threads) {
  constexpr int kChunks = kLineBytes / 16;
#pragma unroll 1
  for (int i = thread; i < kBytes / 16; i += threads)
    if (i / kChunks % kDepth >= first) reinterpret_cast<uint4*>(stage)[i] = uint4{};
}

// sums[i] are the results of wgmma.cuh of rows 64 i on of the warpgroup's part; `group` is its
// number.
template <typename T, typename Shape, typename Operands>
__device__ __forceinline__ void multiply_tile(Ring<Shape>& ring, int depth, int group,
                                              typename Shape::Sums& sums) {
  using Left = typename Operands::Left;
  using Right = typename Operands::Right;
#pragma unroll
  for (int i = 0; i < Shape::kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 2; ++j) sums[i][j] = 0;
    simt::pin(sums[i]);
  }
  const int part_of_tile = Shape::kGroups == 2 ? group : 0;
  constexpr auto step_bytes = [](Run run) { return run == Run::kDepth ? 32 : 16 * kLineBytes; };
  const uint64_t left = simt::operand_at<Left::kRun>(
      ring.address() + part_of_tile * (Shape::kBlocks * kBlockBytes), kBlockBytes);
  const uint64_t right =
      simt::operand_at<Right::kRun>(ring.address() + Shape::kLeftBytes, kBlockBytes);
  int previous = -1;
  const auto multiply_stage = [&] {
    if constexpr (Left::kGathered || Right::kGathered) simt::fence_async_proxy();
    simt::wgmma_fence();
    const uint64_t at = simt::operand_step(Shape::kStageBytes) * ring.at();
#pragma unroll
    for (int part = 0; part < kDepth / 16; ++part)
#pragma unroll
      for (int i = 0; i < Shape::kBlocks; ++i)
        simt::wgmma<T, Left::kRun, Right::kRun>(
            sums[i],
            left + at + simt::operand_step(part * step_bytes(Left::kRun) + i * kBlockBytes),
            right + at + simt::operand_step(part * step_bytes(Right::kRun)));
    simt::wgmma_commit();
    // The tensor cores go on while the stage before is given back.
    simt::wgmma_wait<1>();
    if (previous >= 0) ring.release(previous);
    previous = ring.at();
    ring.next();
  };
  constexpr bool kClears = Left::kRunsOn || Right::kRunsOn;
  int start = 0;
  for (; start + (kClears ? kDepth : 1) <= depth; start += kDepth) {
    ring.wait_full();
    multiply_stage();
  }
  if (kClears && start < depth) {
    ring.wait_full();
    // The left operand lies before the right one.
    constexpr int kBegin = Left::kRunsOn ? 0 : Shape::kLeftBytes;
    constexpr int kEnd = Right::kRunsOn ? Shape::kStageBytes : Shape::kLeftBytes;
    constexpr int kSharing = Shape::kGroups * kGroupThreads;
    clear_steps<kEnd - kBegin>(ring.stage() + kBegin, depth - start,
                               part_of_tile * kGroupThreads + threadIdx.x % kGroupThreads,
                               kSharing);
    simt::fence_async_proxy();
    simt::sync_threads(1 + group - part_of_tile, kSharing);
    multiply_stage();
  }
  if (Shape::kGroups == 1 && simt::lane_id() == 0) simt::mbarrier_arrive(ring.turn(group));
  simt::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < Shape::kBlocks; ++i) simt::pin(sums[i]);
  if (previous >= 0) ring.release(previous);
}

// A block's work. for_each(run) calls run(tile) for each of its tiles, the same for all threads;
// depth_of(tile) is the length of its reduction; operands_of(tile, depth) gives its operands; and
// finish(tile, sums, row, patch) takes the sums of a warp's part, of which sums[i] begins at row
// `row` + 64 i of the tile, with the warp's patch of shared memory to work in; before,
// multiply(tile, ring, depth, group, row, sums) makes them as multiply_tile() does. Blocks may be
// without tiles, and tiles without reduction steps.
template <typename T, typename Shape, typename ForEach, typename DepthOf, typename OperandsOf,
          typename Multiply, typename Finish>
__device__ __forceinline__ void run_block(ForEach for_each, DepthOf depth_of,
                                          OperandsOf operands_of, Multiply multiply,
                                          Finish finish) {
  using Tile = typename ForEach::Tile;
  using Operands = decltype(operands_of(std::declval<Tile>(), 0));
  using Left = typename Operands::Left;
  using Right = typename Operands::Right;
  constexpr int kBytes = Left::kBytes + Right::kBytes;
  constexpr bool kGathers = Left::kGathered || Right::kGathered;
  Ring<Shape> ring(simt::dynamic_shared<char>(), (kBytes > 0) + kGathers * kGroupThreads);
  // The same in all lanes, and known to be to the compiler.
  const int warpgroup = __shfl_sync(simt::kFullWarp, threadIdx.x / kGroupThreads, 0);
  if (warpgroup == 0) {
    simt::shrink_registers<kGathers ? 72 : 40>();
    const uint32_t rank = Shape::kCluster > 1 ? simt::cluster_rank() : 0;
    if (kGathers || threadIdx.x == 0) {
      for_each([&](const Tile& tile) {
        const int depth = depth_of(tile), steps = steps_of<T>(depth);
        if (steps == 0) return;
        Operands operands = operands_of(tile, depth);
        for (int step = 0; step < steps; ++step) {
          ring.wait_empty();
          if (kBytes > 0 && threadIdx.x == 0) {
            const SharedAddress to = simt::shared_address(ring.stage());
            simt::mbarrier_arrive_expect(ring.full(), kBytes);
            if constexpr (!Left::kGathered) operands.left.copy(to, step, Boxes<1>{ring.full(), 0});
            if constexpr (!Right::kGathered)
              operands.right.copy(to + Shape::kLeftBytes, step,
                                  Boxes<Shape::kCluster>{ring.full(), rank});
          }
          if constexpr (Left::kGathered) operands.left.gather(ring.stage(), step);
          if constexpr (Right::kGathered)
            operands.right.gather(ring.stage() + Shape::kLeftBytes, step);
          if constexpr (kGathers) simt::mbarrier_arrive_copied(ring.full());
          ring.next();
        }
      });
    }
  } else {
    simt::grow_registers<kGathers ? 216 : 232>();
    const int group = warpgroup - 1, warp = threadIdx.x / 32 - 4;
    const int row = (Shape::kGroups == 2 ? group * 64 * Shape::kBlocks : 0) + warp % 4 * 16;
    int number = -1;
    for_each([&](const Tile& tile) {
      const int depth = depth_of(tile);
      ++number;
      typename Shape::Sums sums;
      if constexpr (Shape::kGroups == 1) {
        if (number % 2 != group) return ring.skip(steps_of<T>(depth));
        ring.wait_turn(group, number / 2);
      }
      multiply(tile, ring, depth, group, row, sums);
      finish(tile, sums, row, ring.patch(warp));
    });
  }
  // Others may still give stages back to this block.
  if constexpr (Shape::kCluster > 1) simt::sync_cluster();
}

// The same with sums of plain products.
template <typename T, typename Shape, typename ForEach, typename DepthOf, typename OperandsOf,
          typename Finish>
__device__ __forceinline__ void run_block(ForEach for_each, DepthOf depth_of,
                                          OperandsOf operands_of, Finish finish) {
  using Tile = typename ForEach::Tile;
  using Operands = decltype(operands_of(std::declval<Tile>(), 0));
  run_block<T, Shape>(
      for_each, depth_of, operands_of,
      [](const Tile&, Ring<Shape>& ring, int depth, int group, int, typename Shape::Sums& sums) {
        multiply_tile<T, Shape, Operands>(ring, depth, group, sums);
      },
      finish);
}

// for_each_row_tile() and for_each_sum_tile() as run_block() takes them.
template <typename Shape>
struct RowTiles {
  using Tile = grouped::Tile;
  const GroupTile* plan;
  const TileGrid& grid;
  int width = Shape::kColumns;  // columns of results in a tile
  template <typename Run>
  __device__ __forceinline__ void operator()(Run run) const {
    if constexpr (Shape::kCluster == 1) {
      for_each_row_tile(plan, grid, Shape::kHeight, width, run);
    } else {
      // A block may find no rows in its part of a tile; it brings and multiplies like the others.
      const int below = static_cast<int>(simt::cluster_rank()) * Shape::kRows;
      for_each_row_tile(
          plan, grid, Shape::kHeight, width,
          [&](Tile tile) {
            tile.row += below;
            run(tile);
          },
          blockIdx.x / Shape::kCluster, gridDim.x / Shape::kCluster);
    }
  }
};
template <typename Shape>
struct SumTiles {
  using Tile = grouped::SumTile;
  const int32_t* expert_offsets;
  const TileGrid& grid;
  template <typename Run>
  __device__ __forceinline__ void operator()(Run run) const {
    for_each_sum_tile(expert_offsets, grid, Shape::kRows, Shape::kColumns, run);
  }
};

// 16 rows of 128 results of a 16-bit type on their way through a warp's patch, so that they leave
// in whole 16-byte chunks.
template <typename T>
class Patch {
 public:
  static constexpr int kColumns = 128;
  static constexpr int kChunks = kColumns / 8;
  __device__ __forceinline__ explicit Patch(char* shared) : shared_(shared) {}

  // 128 columns of sums, each rounded once, from sums[kFirst] on.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void put(const float (&sums)[kCount]) const {
    static_assert(kFirst + kColumns / 2 <= kCount);
    const int lane = simt::lane_id();
#pragma unroll
    for (int j = 0; j < kChunks; j += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int l = 0; l < 4; ++l)
        pairs[l] =
            simt::round_pair<T>(sums[kFirst + 4 * j + 2 * l], sums[kFirst + 4 * j + 2 * l + 1]);
      simt::stmatrix_x4(simt::shared_address(shared_ + place(lane % 16, j + lane / 16)), pairs);
    }
  }
  // To out[row, column] for the first `rows` and `columns`. The warp passes a barrier before, and
  // one after.
  __device__ __forceinline__ void copy_out(T* out, int64_t ld, int rows, int columns) const {
    __syncwarp();
    const int chunk = simt::lane_id() % kChunks;
    T* to = out + simt::lane_id() / kChunks * ld + 8 * chunk;
#pragma unroll
    for (int i = 0; i < 8; ++i, to += 2 * ld) {
      const int row = 2 * i + simt::lane_id() / kChunks;
      if (row < rows && 8 * chunk < columns)
        *reinterpret_cast<uint4*>(to) =
            *reinterpret_cast<const uint4*>(shared_ + place(row, chunk));
    }
    __syncwarp();
  }

 private:
  __device__ static __forceinline__ int place(int row, int chunk) {
    return (row * kChunks + (chunk ^ row % 8)) * 16;
  }
  char* shared_;
};

// The sums of 16 rows to out[row, column] for the first `rows` and `columns`, each rounded once.
// Rows of out are a multiple of 16 bytes, and so is its address.
template <typename T, int kCount>
__device__ __forceinline__ void store_sums(const float (&sums)[kCount], char* shared, T* out,
                                           int64_t ld, int rows, int columns) {
  if constexpr (sizeof(T) == 2) {
    const Patch<T> patch(shared);
    patch.template put<0>(sums);
    patch.copy_out(out, ld, rows, columns);
    if constexpr (kCount == 128) {
      patch.template put<64>(sums);
      patch.copy_out(out + 128, ld, rows, columns - 128);
    }
  } else {
    // Four lanes write 32 bytes, a whole sector.
    const int row = simt::lane_id() / 4, column = simt::lane_id() % 4 * 2;
    T* to = out + row * ld + column;
#pragma unroll
    for (int half = 0; half < 2; ++half, to += 8 * ld)
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j)
        if (row + 8 * half < rows && column + 8 * j < columns)
          *reinterpret_cast<float2*>(to + 8 * j) =
              float2{sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]};
  }
}

// Sums of 16 rows in a warp's patch, 64 in a row, so that a rolled loop can go over neighbours:
// unrolled, an activation would be compiled once for each sum of a thread.
class Parked {
 public:
  __device__ __forceinline__ explicit Parked(char* shared) : shared_(shared) {}

  // 32 columns from sums[kFirst] on, then 32 from sums[kSecond] on. The warp passes a barrier.
  template <int kFirst, int kSecond, int kCount>
  __device__ __forceinline__ void put(const float (&sums)[kCount]) const {
    static_assert(kFirst + 16 <= kCount && kSecond + 16 <= kCount);
    const int row = simt::lane_id() / 4, half = simt::lane_id() / 2 % 2, pair = simt::lane_id() % 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int first = j < 4 ? kFirst + 4 * j : kSecond + 4 * (j - 4);
#pragma unroll
      for (int l = 0; l < 4; l += 2)
        *reinterpret_cast<float2*>(shared_ + place(row + 4 * l, 2 * j + half) + 8 * pair) =
            float2{sums[first + l], sums[first + l + 1]};
    }
    __syncwarp();
  }
  // Four neighbours.
  __device__ __forceinline__ float4 get(int row, int chunk) const {
    return *reinterpret_cast<const float4*>(shared_ + place(row, chunk));
  }

 private:
  // Written 4 rows of 2 chunks at once, read 2 rows of 4 even or odd ones.
  __device__ static __forceinline__ int place(int row, int chunk) {
    return row * 256 + (chunk ^ (row % 4 * 2 + row % 2)) * 16;
  }
  char* shared_;
};

// Calls fn.template operator()<number>() for a number from 0 to kCount - 1.
template <int kCount, typename F>
__device__ __forceinline__ void dispatch_number(int number, F&& fn) {
  if constexpr (kCount == 1) {
    fn.template operator()<0>();
  } else if (number == kCount - 1) {
    fn.template operator()<kCount - 1>();
  } else {
    dispatch_number<kCount - 1>(number, fn);
  }
}

// out[m, n] = sum_k a[m, k] b[e, n, k] (kNt) or ... b[e, k, n] for the rows m of expert e, by all
// blocks; a is [M, k], out [M, n]. Zeros for the rows of no expert.
template <typename T, typename Shape, bool kNt, typename Out>
__device__ __forceinline__ void multiply_rows(const GroupTile* plan, const TileGrid& grid,
                                              const simt::TensorMap* a, const simt::TensorMap* b,
                                              Out* out, int k, int64_t n, int num_experts) {
  using Left = Rows<Shape::kRows>;
  using Right = std::conditional_t<kNt, Rows<Shape::kColumns, Shape::kCluster>,
                                   Steps<Shape::kColumns, false>>;
  run_block<T, Shape>(
      RowTiles<Shape>{plan, grid}, [&](const Tile& t) { return t.group < num_experts ? k : 0; },
      [&](const Tile& t, int) {
        if constexpr (kNt)
          return Operands{Left{a, 0, t.row}, Right{b, t.group, t.column}};
        else
          return Operands{Left{a, 0, t.row}, Right{b, t.group, 0, t.column}};
      },
      [&](const Tile& t, const typename Shape::Sums& sums, int row, char* patch) {
        const int columns = clamp_left(n - t.column, Shape::kColumns);
#pragma unroll
        for (int i = 0; i < Shape::kBlocks; ++i) {
          const int first = t.row + row + 64 * i;
          store_sums(sums[i], patch, out + first * n + t.column, n, t.end - first, columns);
        }
      });
}

// out[e, i, j] = sum over the rows m of expert e of left(m, i) right(m, j), by all blocks; out is
// [E, n1, n2]. operands_of() as for run_block().
template <typename T, typename Shape, typename OperandsOf>
__device__ __forceinline__ void multiply_sums(const int32_t* expert_offsets, const TileGrid& grid,
                                              T* out, int64_t n1, int64_t n2,
                                              OperandsOf operands_of) {
  run_block<T, Shape>(
      SumTiles<Shape>{expert_offsets, grid}, [&](const SumTile& t) { return t.end - t.begin; },
      operands_of,
      [&](const SumTile& t, const typename Shape::Sums& sums, int row, char* patch) {
        const int columns = clamp_left(n2 - t.column, Shape::kColumns);
#pragma unroll
        for (int i = 0; i < Shape::kBlocks; ++i) {
          const int first = t.row + row + 64 * i;
          store_sums(sums[i], patch, out + (t.expert * n1 + first) * n2 + t.column, n2,
                     clamp_left(n1 - first, 64), columns);
        }
      });
}

#endif

}  // namespace mergeme::grouped::sm90
