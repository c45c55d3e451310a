// What the asynchronous copies share: targets that hold poison until data arrives, and mbarriers.
#pragma once
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {

// Fills shared memory with NaNs, so that reading it before the wait shows.
void poison(uint8_t* to, uint64_t bytes);

// An mbarrier and where it lies.
struct MBarrierPlace {
  Block* block;
  uint32_t offset;
  MBarrier* state;
};

// The mbarrier at an address, which must have been initialised and not been overwritten.
MBarrierPlace find_mbarrier(Warp& warp, const Instruction& instruction, int lane, Space space,
                            uint64_t address);

// Fewer arrivals or bytes are pending: ends the phase if it is complete.
void update_mbarrier(Block& block, uint32_t offset, MBarrier& state);

// Address k of an instruction, with its offset.
inline uint64_t address_of(const Warp& warp, const Instruction& instruction, int k, int lane) {
  const Operand& operand = instruction.operands[k];
  return row(warp, operand)[lane] + operand.offset;
}

}  // namespace mergeme::ptx
