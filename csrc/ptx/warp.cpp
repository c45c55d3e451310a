// A warp at work: the loop over instructions, divergence and reconvergence.
//
// Every lane has a program counter. The lanes at the smallest one run together as a group until the
// group reaches the pc of another lane, and takes it along.
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {
namespace {

// After so many backward jumps of a group that others wait behind, the others have a turn: a spin
// loop may wait for one of them.
constexpr int kLongLoop = 4096;

}  // namespace

void Warp::enter_frame() {
  Frame& frame = *frames.back();
  registers = frame.registers.data();
  banks = {registers, frame.function->immediate_bank.data(), special_registers.data()};
  predicates = frame.predicates.data();
  frame_local = frame.local_base;
  code = frame.function->code.data();
}

void Warp::leave_group(uint32_t next_pc) {
  Frame& frame = *frames.back();
  for_each_lane(mask, [&](int lane) { frame.pc[lane] = next_pc; });
  has_group = false;
}

void Warp::regroup() {
  if (has_group) leave_group(pc);
  Frame& frame = *frames.back();
  const uint32_t ready = frame.mask & ~frame.waiting;
  if (!ready) {
    mask = 0;
    return;
  }
  uint32_t lowest = kNoPc;
  uint32_t lowest_beyond = kNoPc;  // the loop to avoid
  for_each_lane(ready, [&](int lane) {
    lowest = std::min(lowest, frame.pc[lane]);
    if (frame.pc[lane] > avoid) lowest_beyond = std::min(lowest_beyond, frame.pc[lane]);
  });
  const bool avoids = avoid != kNoPc && lowest <= avoid && lowest_beyond != kNoPc;
  pc = avoids ? lowest_beyond : lowest;
  mask = 0;
  limit = kNoPc;
  for_each_lane(ready, [&](int lane) {
    if (frame.pc[lane] == pc)
      mask |= 1u << lane;
    else if (!avoids || frame.pc[lane] > pc)
      limit = std::min(limit, frame.pc[lane]);
  });
  avoid = kNoPc;
  has_group = true;
  loop_steps = 0;
}

void Warp::branch(const Instruction& instruction, uint32_t taken) {
  const auto target = static_cast<uint32_t>(instruction.target);
  if (taken == mask) {
    const bool backwards_past_others = target <= pc && limit != kNoPc;
    pc = target;
    if (backwards_past_others && ++loop_steps > kLongLoop) {
      avoid = pc;
      regroup();
    } else if (pc >= limit) {
      regroup();
    }
    return;
  }
  if (!taken) {
    if (++pc >= limit) regroup();
    return;
  }
  Frame& frame = *frames.back();
  const uint32_t next = pc + 1;
  leave_group(next);
  for_each_lane(taken, [&](int lane) { frame.pc[lane] = target; });
  int steps = loop_steps + 1;
  if (steps > kLongLoop) {
    avoid = std::min(target, next);
    steps = 0;
  }
  regroup();
  loop_steps = steps;
}

void Warp::indexed_branch(const Instruction& instruction, uint32_t lanes) {
  Frame& frame = *frames.back();
  const uint64_t* index = row(*this, instruction.operands[0]);
  leave_group(pc + 1);
  for_each_lane(lanes, [&](int lane) {
    const auto k = static_cast<uint32_t>(index[lane]);
    if (k >= instruction.targets.size()) fail(instruction, lane, "brx.idx index out of range");
    frame.pc[lane] = static_cast<uint32_t>(instruction.targets[k]);
  });
  regroup();
}

// A wgmma is one operation of four warps: it is complete when all four have issued it.
bool Warp::wgmma_wait(const Instruction& instruction) {
  if (mask != kFullMask) {
    synchronize(instruction);
    return true;
  }
  const auto in_flight = static_cast<uint64_t>(instruction.immediate);
  const uint64_t awaited = wgmma_group > in_flight ? wgmma_group - in_flight : 0;
  for (const std::unique_ptr<Warp>& other : block->warps)
    if (other->id / 4 == id / 4 && other->alive && other->wgmma_group < awaited) return false;
  current = &instruction;
  instruction.execute(*this, instruction, mask);
  pc++;
  return true;
}

RunResult Warp::run(int budget) {
  enter_frame();
  has_group = false;
  regroup();
  const int given = budget;
  // Counted on every way out.
  struct Count {
    const int& given;
    const int& left;
    uint64_t& total;
    ~Count() { total += static_cast<uint64_t>(given - left); }
  } const count{given, budget, launch->statistics.warp_instructions};

  while (budget > 0) {
    if (!has_group) {
      if (!alive) return RunResult::kFinished;
      if (frames.back()->mask == 0 && frames.size() > 1) return_from_call(0);
      regroup();
      if (!has_group) {
        if (!alive) return RunResult::kFinished;
        blocked = true;
        return RunResult::kBlocked;
      }
    }
    const Instruction& instruction = code[pc];
    uint32_t active = mask;
    if (instruction.guard >= 0) {
      const uint32_t guard = predicates[instruction.guard];
      active &= instruction.guard_negated ? ~guard : guard;
    }
    budget--;
    instruction.warp_count++;
    instruction.lane_count += static_cast<uint64_t>(std::popcount(active));
    if (instruction.control == Control::kNone) {
      if (active) instruction.execute(*this, instruction, active);
      if (++pc >= limit) regroup();
      continue;
    }
    if (instruction.control == Control::kBranch) {
      branch(instruction, active);
      continue;
    }
    if (!active) {
      if (++pc >= limit) regroup();
      continue;
    }
    if (instruction.control == Control::kIndexedBranch) {
      indexed_branch(instruction, active);
      continue;
    }
    if (active != mask) {  // the lanes whose guard is false go on alone
      Frame& frame = *frames.back();
      for_each_lane(mask & ~active, [&](int lane) { frame.pc[lane] = pc + 1; });
      mask = active;
      limit = std::min(limit, pc + 1);
    }
    switch (instruction.control) {
      case Control::kReturn:
        return_from_call(active);
        if (has_group) regroup();
        break;
      case Control::kExit:
        exit(active);
        break;
      case Control::kCall:
        call(instruction, active);
        break;
      case Control::kWarpSync:
        synchronize(instruction);
        break;
      case Control::kBarrier:
        barrier(instruction);
        if (!has_group) regroup();
        break;
      case Control::kClusterBarrier:
        cluster_barrier(instruction);
        if (!has_group) regroup();
        break;
      case Control::kWgmmaWait:
        if (!wgmma_wait(instruction)) {
          leave_group(pc);
          return RunResult::kWaiting;
        }
        break;
      case Control::kTryWait:
        current = &instruction;
        instruction.execute(*this, instruction, active);
        pc++;
        if (wait_failed) {
          avoid = pc;
          leave_group(pc);
          return RunResult::kWaiting;
        }
        break;
      case Control::kYield:
        pc++;
        regroup();
        return RunResult::kBudgetSpent;
      default:
        break;
    }
    if (!alive) return RunResult::kFinished;
    if (has_group && pc >= limit) regroup();
  }
  if (has_group) leave_group(pc);
  return RunResult::kBudgetSpent;
}

}  // namespace mergeme::ptx
