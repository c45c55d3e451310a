// Blocks and clusters come to life, warps take turns, and a launch that cannot go on is stopped.
#include <chrono>

#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

using Cluster = std::vector<Block*>;

constexpr int kSmCount = 132;  // what %nsmid says, that of an H100
// With seed 0 a warp runs until it must wait, or for so long that it seems to spin.
constexpr int kLongSlice = 100000;
constexpr int kMaxSliceBits = 15;
constexpr int kSlicesBetweenClockReads = 64;
constexpr uint64_t kPoisonRegister = uint64_t{kPoison} << 32 | kPoison;
constexpr uint8_t kLocalPoison = 0xc0;

void fill_with_poison(uint8_t* bytes, size_t count) {
  for (size_t k = 0; k < count; k++) bytes[k] = static_cast<uint8_t>(kPoison >> (k % 4 * 8));
}

void fill_special_registers(Warp& warp, int num_warps, uint64_t linear_block) {
  using enum SpecialRegister;
  const Block& block = *warp.block;
  const Launch& launch = *warp.launch;
  const LaunchOptions& options = launch.options;
  warp.special_registers.assign(static_cast<size_t>(kCount) * kWarpSize, 0);
  const auto set = [&](SpecialRegister name, auto value_of_lane) {
    uint64_t* values = &warp.special_registers[static_cast<size_t>(name) * kWarpSize];
    for (int lane = 0; lane < kWarpSize; lane++)
      values[lane] = static_cast<uint32_t>(value_of_lane(lane));
  };
  const auto set_all = [&](SpecialRegister name, auto value) {
    set(name, [&](int) { return value; });
  };
  // .x, .y and .z of a register follow each other.
  const auto set_triple = [&](SpecialRegister x, auto value_of_axis) {
    for (int axis = 0; axis < 3; axis++)
      set_all(static_cast<SpecialRegister>(static_cast<int>(x) + axis), value_of_axis(axis));
  };
  const std::array<int32_t, 3>& size = options.block;
  const auto thread = [&](int lane) { return warp.id * kWarpSize + lane; };
  set(kTidX, [&](int lane) { return thread(lane) % size[0]; });
  set(kTidY, [&](int lane) { return thread(lane) / size[0] % size[1]; });
  set(kTidZ, [&](int lane) { return thread(lane) / (size[0] * size[1]); });
  set_triple(kNtidX, [&](int axis) { return size[axis]; });
  set_triple(kCtaidX, [&](int axis) { return block.ctaid[axis]; });
  set_triple(kNctaidX, [&](int axis) { return options.grid[axis]; });
  set_triple(kClusterIdX, [&](int axis) { return block.ctaid[axis] / options.cluster[axis]; });
  set_triple(kNumClustersX, [&](int axis) { return options.grid[axis] / options.cluster[axis]; });
  set_triple(kClusterCtaidX, [&](int axis) { return block.ctaid[axis] % options.cluster[axis]; });
  set_triple(kClusterNctaidX, [&](int axis) { return options.cluster[axis]; });
  const size_t cluster_size = block.cluster->size();
  set_all(kClusterCtaRank, block.rank);
  set_all(kClusterNctaRank, cluster_size);
  set_all(kIsExplicitCluster, cluster_size > 1);
  set(kLaneId, [](int lane) { return lane; });
  set_all(kWarpId, warp.id);
  set_all(kNumWarps, num_warps);
  set_all(kSmId, linear_block % kSmCount);
  set_all(kNumSms, kSmCount);
  set(kLaneMaskEq, [](int lane) { return 1u << lane; });
  set(kLaneMaskLt, [](int lane) { return (1u << lane) - 1; });
  set(kLaneMaskLe, [](int lane) { return (2u << lane) - 1; });
  set(kLaneMaskGe, [](int lane) { return ~((1u << lane) - 1); });
  set(kLaneMaskGt, [](int lane) { return ~((2u << lane) - 1); });
  set_all(kDynamicSharedSize, options.shared_bytes);
  set_all(kTotalSharedSize, launch.shared_bytes);
  set_all(kAggregateSharedSize, launch.shared_bytes);
}

std::unique_ptr<Warp> new_warp(Launch& launch, Block& block, int id, int num_lanes) {
  auto warp = std::make_unique<Warp>();
  warp->block = &block;
  warp->launch = &launch;
  warp->id = id;
  warp->alive = kFullMask >> (kWarpSize - num_lanes);
  warp->local_bytes = launch.local_bytes_per_lane;
  const Function& kernel = *launch.kernel;
  auto frame = std::make_unique<Frame>();
  frame->function = launch.kernel;
  frame->registers.assign(static_cast<size_t>(kernel.num_registers() + kSinkRows) * kWarpSize,
                          kPoisonRegister);
  frame->predicates.assign(static_cast<size_t>(kernel.num_predicates) + 1, 0);
  frame->mask = warp->alive;
  frame->params.assign(((kernel.param_bytes + 31) & ~uint64_t{15}) * kWarpSize, 0);
  warp->frames.push_back(std::move(frame));
  return warp;
}

std::unique_ptr<Block> new_block(Launch& launch, uint64_t linear, Cluster& cluster) {
  const LaunchOptions& options = launch.options;
  const std::array<int32_t, 3>& grid = options.grid;
  auto block = std::make_unique<Block>();
  block->launch = &launch;
  block->cluster = &cluster;
  block->rank = static_cast<int>(cluster.size());
  block->ctaid = {static_cast<int>(linear % grid[0]), static_cast<int>(linear / grid[0] % grid[1]),
                  static_cast<int>(linear / (static_cast<uint64_t>(grid[0]) * grid[1]))};
  cluster.push_back(block.get());
  block->shared_bytes = launch.shared_bytes;
  block->shared_storage = AlignedBytes(launch.shared_bytes);
  block->shared = block->shared_storage.data();
  fill_with_poison(block->shared, launch.shared_bytes);
  const int threads = options.block[0] * options.block[1] * options.block[2];
  const int num_warps = (threads + kWarpSize - 1) / kWarpSize;
  const uint64_t local_of_warp = kWarpSize * launch.local_bytes_per_lane;
  block->local_storage = AlignedBytes(static_cast<size_t>(num_warps) * local_of_warp);
  std::memset(block->local_storage.data(), kLocalPoison,
              static_cast<size_t>(num_warps) * local_of_warp);
  for (int id = 0; id < num_warps; id++) {
    block->warps.push_back(
        new_warp(launch, *block, id, std::min(kWarpSize, threads - id * kWarpSize)));
    block->warps.back()->local_memory =
        block->local_storage.data() + static_cast<uint64_t>(id) * local_of_warp;
  }
  block->live_warps = num_warps;
  return block;
}

// The linear indices of the blocks of every cluster, in the order in which they start.
std::vector<std::vector<uint64_t>> cluster_order(Launch& launch) {
  const auto& [gx, gy, gz] = launch.options.grid;
  const auto& [cx, cy, cz] = launch.options.cluster;
  std::vector<std::vector<uint64_t>> order;
  for (int z = 0; z < gz; z += cz)
    for (int y = 0; y < gy; y += cy)
      for (int x = 0; x < gx; x += cx) {
        std::vector<uint64_t>& blocks = order.emplace_back();
        for (int dz = 0; dz < cz; dz++)
          for (int dy = 0; dy < cy; dy++)
            for (int dx = 0; dx < cx; dx++)
              blocks.push_back(static_cast<uint64_t>(x + dx) +
                               static_cast<uint64_t>(gx) *
                                   (static_cast<uint64_t>(y + dy) +
                                    static_cast<uint64_t>(gy) * static_cast<uint64_t>(z + dz)));
      }
  if (launch.options.order == BlockOrder::kReverse) std::reverse(order.begin(), order.end());
  if (launch.options.order == BlockOrder::kRandom)
    std::shuffle(order.begin(), order.end(), launch.random);
  return order;
}

class Scheduler {
 public:
  explicit Scheduler(Launch& launch) : launch_(launch), waiting_clusters_(cluster_order(launch)) {
    const auto& [x, y, z] = launch.options.cluster;
    cluster_size_ = static_cast<size_t>(x * y * z);
    const auto resident = static_cast<size_t>(std::max(launch.options.resident, 1));
    max_resident_ = std::max<size_t>(1, resident / cluster_size_) * cluster_size_;
  }

  void run() {
    while (next_cluster_ < waiting_clusters_.size() || !blocks_.empty()) {
      start_clusters();
      Warp& warp = pick_warp();
      const RunResult result = warp.run(budget_);
      slices_++;
      watch_progress(result);
      settle(warp, result);
      check_limits();
    }
  }

 private:
  void start_clusters() {
    bool started = false;
    while (next_cluster_ < waiting_clusters_.size() &&
           blocks_.size() + cluster_size_ <= max_resident_) {
      Cluster& cluster = *clusters_.emplace_back(std::make_unique<Cluster>());
      for (const uint64_t linear : waiting_clusters_[next_cluster_]) {
        blocks_.push_back(new_block(launch_, linear, cluster));
        launch_.statistics.blocks++;
      }
      for (size_t k = 0; k < cluster_size_; k++) {
        Block& block = *cluster[k];
        for (const std::unique_ptr<Warp>& warp : block.warps)
          fill_special_registers(*warp, block.live_warps, waiting_clusters_[next_cluster_][k]);
      }
      next_cluster_++;
      started = true;
    }
    if (started) list_residents();
  }

  void list_residents() {
    launch_.resident.clear();
    for (const std::unique_ptr<Block>& block : blocks_) launch_.resident.push_back(block.get());
  }

  // Chooses a warp that can run, and for how many instructions.
  Warp& pick_warp() {
    runnable_.clear();
    for (const std::unique_ptr<Block>& block : blocks_)
      for (const std::unique_ptr<Warp>& warp : block->warps)
        if (!warp->done && !warp->blocked) runnable_.push_back(warp.get());
    if (runnable_.empty()) throw Error("deadlock: no thread can go on" + launch_.describe_warps());
    if (launch_.options.seed == 0) {
      budget_ = kLongSlice;
      return *runnable_[turn_++ % runnable_.size()];
    }
    const uint64_t random = launch_.random();
    budget_ = 1 << ((random >> 32) % kMaxSliceBits);
    return *runnable_[random % runnable_.size()];
  }

  // Warps that poll never block. If all there is left is polling, nothing will change any more. A
  // slice that ended between two polls says nothing.
  void watch_progress(RunResult result) {
    constexpr int kShortSlice = 8;
    if (result == RunResult::kBlocked) return;
    const bool too_short = result == RunResult::kBudgetSpent && budget_ <= kShortSlice;
    if (too_short && launch_.progress == last_progress_) return;
    if (result != RunResult::kWaiting || launch_.progress != last_progress_) {
      failed_polls_ = 0;
      last_progress_ = launch_.progress;
    } else if (++failed_polls_ > 200 + 20 * runnable_.size()) {
      throw Error("deadlock: every running warp waits at an mbarrier that nobody completes" +
                  launch_.describe_warps());
    }
  }

  void settle(Warp& warp, RunResult result) {
    Block& block = *warp.block;
    if (result == RunResult::kFinished) {
      warp.done = true;
      block.live_warps--;
      block.check_barriers();
      block.check_cluster();
      block.done = block.live_warps == 0;
    } else if (result == RunResult::kBlocked || block.barriers[0].arrived) {
      block.check_barriers();
    }
    if (!block.done) return;
    // A cluster leaves as a whole: its blocks may read each other's shared memory.
    Cluster* cluster = block.cluster;
    if (!std::all_of(cluster->begin(), cluster->end(), [](const Block* b) { return b->done; }))
      return;
    std::erase_if(blocks_, [&](const auto& b) { return b->cluster == cluster; });
    std::erase_if(clusters_, [&](const auto& c) { return c.get() == cluster; });
    list_residents();
  }

  void check_limits() {
    const LaunchOptions& options = launch_.options;
    if (launch_.statistics.warp_instructions > options.max_steps)
      throw Error(concat("step limit reached (", options.max_steps, " warp instructions)",
                         blocks_.empty() ? "" : launch_.describe_warps()));
    if (slices_ % kSlicesBetweenClockReads != 0 || blocks_.empty()) return;
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    if (elapsed.count() > options.max_seconds)
      throw Error("time limit reached" + launch_.describe_warps());
  }

  Launch& launch_;
  const std::vector<std::vector<uint64_t>> waiting_clusters_;
  size_t cluster_size_;
  size_t max_resident_;
  size_t next_cluster_ = 0;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Warp*> runnable_;
  size_t turn_ = 0;
  int budget_ = 0;
  uint64_t slices_ = 0;
  uint64_t failed_polls_ = 0;
  uint64_t last_progress_ = 0;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

void Launch::run() {
  random.seed(options.seed * uint64_t{7919} + 12345);
  reverse_lanes = options.seed & 1;
  Scheduler(*this).run();
}

}  // namespace mergeme::ptx
