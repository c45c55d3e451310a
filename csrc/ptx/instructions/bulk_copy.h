// What bulk and tensor copies share: where they go, and when they land.
#pragma once
#include "csrc/ptx/instructions/async_copy.h"

namespace mergeme::ptx {

// The blocks that a load of `operand`'s multicast mask reaches, or the one the address lies in.
std::vector<Block*> load_targets(Warp& warp, const Instruction& instruction, int lane,
                                 Block* addressed, int mask_operand);

// Begins a load that `land` carries out when the mbarrier of operand k is awaited, or of a
// multicast the one at the same place in the target's block.
void begin_load(Warp& warp, const Instruction& instruction, int lane, int mbarrier_operand,
                Block& target, uint32_t bytes, std::function<void()> land);

// Begins a store of the lane's current bulk group. Half of the seeds read the source at once, the
// others as late as they may: a source that is changed before the wait shows in one of them.
void begin_store(Warp& warp, int lane, uint32_t bytes, std::function<void()> read,
                 std::function<void()> land);

}  // namespace mergeme::ptx
