// Where lanes, warps and blocks wait for each other: .sync instructions, barriers, clusters.
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

int num_threads(const Launch& launch) {
  return launch.options.block[0] * launch.options.block[1] * launch.options.block[2];
}

void write_reduction(const Barrier& barrier, const Barrier::Reduce& reduce) {
  const Instruction& instruction = *reduce.instruction;
  Frame& frame = *reduce.warp->frames.back();
  const auto result = static_cast<size_t>(instruction.operands[0].index);
  if (instruction.reduction == Reduction::kAdd) {
    uint64_t* d = frame.registers.data() + result * kWarpSize;
    for_each_lane(reduce.lanes, [&](int lane) { d[lane] = static_cast<uint64_t>(barrier.count); });
    return;
  }
  const bool value = instruction.reduction == Reduction::kAnd ? barrier.all_true : barrier.any_true;
  uint32_t& predicate = frame.predicates[result];
  predicate = (predicate & ~reduce.lanes) | (value ? reduce.lanes : 0);
}

void release(Block& block, Barrier& barrier) {
  for (const Barrier::Reduce& reduce : barrier.reduces) write_reduction(barrier, reduce);
  for (const auto& [warp, lanes] : barrier.waiting) {
    Frame& frame = *warp->frames.back();
    frame.waiting &= ~lanes;
    frame.at_barrier &= ~lanes;
    warp->blocked = false;
  }
  if (barrier.whole_block) block.epoch++;
  barrier = Barrier();
  block.launch->statistics.barriers++;
  block.launch->progress++;
}

// The predicate of a bar.red in each lane.
uint32_t predicate_of(const Warp& warp, const Operand& operand, uint32_t lanes) {
  uint32_t values = 0;
  if (operand.kind == OperandKind::kPredicate) {
    values = warp.predicates[operand.index];
  } else {
    const uint64_t* source = row(warp, operand);
    for_each_lane(lanes,
                  [&](int lane) { values |= static_cast<uint32_t>(source[lane] != 0) << lane; });
  }
  return (operand.negated ? ~values : values) & lanes;
}

struct BarrierOperands {
  uint32_t number = 0;
  bool has_count = false;
  uint32_t count = 0;
};

// bar.sync number, count; bar.red has a destination before them and a predicate behind.
BarrierOperands read_operands(Warp& warp, const Instruction& instruction, int lane) {
  const bool reduces = instruction.barrier_part == BarrierPart::kReduce;
  const size_t first = reduces ? 1 : 0;
  const auto num_operands = static_cast<size_t>(instruction.num_operands) - (reduces ? 1 : 0);
  const auto value = [&](size_t k) {
    return static_cast<uint32_t>(row(warp, instruction.operands[k])[lane]);
  };
  BarrierOperands read;
  if (num_operands > first) read.number = value(first);
  if (num_operands > first + 1) {
    read.has_count = true;
    read.count = value(first + 1);
  }
  if (read.number >= std::tuple_size_v<decltype(Block::barriers)>)
    warp.fail(instruction, lane, concat("there is no barrier ", read.number));
  if (read.has_count && (read.count % kWarpSize || read.count == 0))
    warp.fail(instruction, lane,
              concat("barrier thread count ", read.count, " is not a multiple of the warp size"));
  return read;
}

void join_barrier(Warp& warp, const Instruction& instruction, int lane,
                  const BarrierOperands& given, Barrier& barrier) {
  const auto rounded =
      static_cast<uint32_t>((num_threads(*warp.launch) + kWarpSize - 1) / kWarpSize * kWarpSize);
  const bool whole_block = !given.has_count || given.count == rounded;
  const bool is_first = barrier.arrived == 0;
  // bar.sync 0 and bar.sync 0, blockDim mean the same, and may meet.
  const bool both_whole = whole_block && barrier.whole_block;
  const bool same = barrier.all_threads != given.has_count &&
                    (!given.has_count || barrier.expected == given.count);
  if (!is_first && !both_whole && !same)
    warp.fail(
        instruction, lane,
        concat("barrier ", given.number, " is used with different thread counts at one time"));
  if (is_first) {
    barrier.all_threads = !given.has_count;
    barrier.expected = given.count;
  } else if (both_whole && given.has_count) {
    barrier.all_threads = false;
    barrier.expected = given.count;
  }
  barrier.whole_block = whole_block;
  if (!whole_block) warp.block->complex_sync = true;
}

}  // namespace

// The lanes that are at this instruction: the group, and those that wait here for the others.
uint32_t Warp::gathered_at_pc() const {
  const Frame& frame = *frames.back();
  uint32_t lanes = mask;
  for_each_lane(frame.waiting & ~frame.at_barrier, [&](int lane) {
    if (frame.pc[lane] == pc) lanes |= 1u << lane;
  });
  return lanes;
}

bool Warp::gather_whole(uint32_t& lanes) {
  Frame& frame = *frames.back();
  lanes = gathered_at_pc();
  if (lanes != alive) {
    frame.waiting |= mask;
    leave_group(pc);
    return false;
  }
  frame.waiting &= ~lanes;
  return true;
}

void Warp::synchronize(const Instruction& instruction) {
  if (instruction.aligned)
    synchronize_whole(instruction);
  else
    synchronize_members(instruction);
}

void Warp::synchronize_whole(const Instruction& instruction) {
  uint32_t lanes = mask;
  const bool together = mask == kFullMask && frames.back()->waiting == 0;
  if (!together) {
    if (!gather_whole(lanes)) return;
    if (lanes != kFullMask)
      fail(instruction, std::countr_zero(lanes),
           "a whole-warp instruction was executed by a warp with missing or exited threads");
    mask = lanes;
  }
  current = &instruction;
  instruction.execute(*this, instruction, lanes);
  pc++;
  if (!together) regroup();
}

// Lanes may name different masks; each set runs as soon as all of it is here.
void Warp::synchronize_members(const Instruction& instruction) {
  Frame& frame = *frames.back();
  const uint32_t here = gathered_at_pc();
  const uint64_t* masks =
      row(*this, instruction.operands[static_cast<size_t>(instruction.member_mask)]);
  uint32_t ran = 0;
  for (uint32_t left = here; left;) {
    const int first = std::countr_zero(left);
    const auto members = static_cast<uint32_t>(masks[first]);
    uint32_t group = 0;
    for_each_lane(left, [&](int lane) {
      if (static_cast<uint32_t>(masks[lane]) == members) group |= 1u << lane;
    });
    left &= ~group;
    if (const uint32_t strangers = group & ~members) {
      std::string digits = hex(members).substr(2);
      digits.insert(0, 8 - digits.size(), '0');
      fail(instruction, std::countr_zero(strangers),
           concat("a thread executes a .sync instruction whose member mask (0x", digits,
                  ") does not contain it"));
    }
    const uint32_t needed = members & alive;
    if ((needed & group) != needed) continue;
    current = &instruction;
    instruction.execute(*this, instruction, group);
    ran |= group;
  }
  if (ran == mask && here == mask) {
    pc++;
    return;
  }
  const uint32_t next = pc + 1;
  leave_group(pc);
  for_each_lane(ran, [&](int lane) { frame.pc[lane] = next; });
  frame.waiting = (frame.waiting & ~ran) | (here & ~ran);
  regroup();
}

void Warp::barrier(const Instruction& instruction) {
  uint32_t lanes = mask;
  if (instruction.aligned && !gather_whole(lanes)) return;
  const int first = std::countr_zero(lanes);
  const BarrierOperands given = read_operands(*this, instruction, first);
  Barrier& barrier = block->barriers[given.number];
  join_barrier(*this, instruction, first, given, barrier);
  if (instruction.barrier_part == BarrierPart::kReduce) {
    const Operand& source = instruction.operands[static_cast<size_t>(instruction.num_operands) - 1];
    const uint32_t values = predicate_of(*this, source, lanes);
    barrier.count += std::popcount(values);
    barrier.all_true &= values == lanes;
    barrier.any_true |= values != 0;
    barrier.reduces.push_back({this, &instruction, lanes});
  }
  // A warp counts whole, even one that the block's size leaves incomplete.
  const bool counts_whole =
      instruction.aligned && (!barrier.all_threads || num_threads(*launch) % kWarpSize != 0);
  barrier.arrived += counts_whole ? kWarpSize : static_cast<uint32_t>(std::popcount(lanes));
  Frame& frame = *frames.back();
  for_each_lane(lanes, [&](int lane) { frame.pc[lane] = pc + 1; });
  has_group = false;
  if (instruction.barrier_part != BarrierPart::kArrive) {
    frame.waiting |= lanes;
    frame.at_barrier |= lanes;
    barrier.waiting.emplace_back(this, lanes);
  }
  if (barrier.all_threads)
    block->check_barriers();
  else if (barrier.arrived == barrier.expected)
    release(*block, barrier);
  else if (barrier.arrived > barrier.expected)
    fail(instruction, first,
         concat("more threads arrived at barrier ", given.number, " than its count"));
}

void Block::check_barriers() {
  const auto threads = static_cast<uint32_t>(num_threads(*launch));
  uint32_t live = 0;
  for (const std::unique_ptr<Warp>& warp : warps)
    live += threads % kWarpSize && warp->alive ? kWarpSize
                                               : static_cast<uint32_t>(std::popcount(warp->alive));
  for (Barrier& barrier : barriers) {
    if (!barrier.arrived || !barrier.all_threads || barrier.arrived < live) continue;
    if (live < threads) launch->statistics.barriers_with_exited_threads++;
    release(*this, barrier);
  }
}

void Warp::cluster_barrier(const Instruction& instruction) {
  uint32_t lanes = mask;
  if (instruction.aligned && !gather_whole(lanes)) return;
  Frame& frame = *frames.back();
  for_each_lane(lanes, [&](int lane) { frame.pc[lane] = pc + 1; });
  has_group = false;
  if (block->cluster->size() > 1) block->complex_sync = true;
  if (instruction.barrier_part == BarrierPart::kArrive) {
    if (cluster_arrived & lanes)
      fail(instruction, std::countr_zero(lanes), "barrier.cluster.arrive twice without a wait");
    cluster_arrived |= lanes;
    cluster_target = block->cluster_phase + 1;
    block->check_cluster();
  } else if (block->cluster_phase < cluster_target) {
    frame.waiting |= lanes;
    frame.at_barrier |= lanes;
    in_cluster_wait = true;
  }
}

void Block::check_cluster() {
  int live = 0;
  int arrived = 0;
  for (const Block* member : *cluster)
    for (const std::unique_ptr<Warp>& warp : member->warps) {
      live += std::popcount(warp->alive);
      arrived += std::popcount(warp->cluster_arrived & warp->alive);
    }
  if (arrived < live) return;
  for (Block* member : *cluster) {
    for (const std::unique_ptr<Warp>& warp : member->warps) {
      warp->cluster_arrived = 0;
      if (!warp->in_cluster_wait) continue;
      Frame& frame = *warp->frames.back();
      frame.waiting &= ~frame.at_barrier;
      frame.at_barrier = 0;
      warp->blocked = false;
      warp->in_cluster_wait = false;
    }
    member->cluster_phase++;
    member->epoch++;
    launch->progress++;
  }
}

}  // namespace mergeme::ptx
