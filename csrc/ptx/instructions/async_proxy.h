// fence.proxy.async: what threads store to shared memory goes through the generic proxy, and wgmma
// and bulk copies read it through the async proxy. Between the two a fence.proxy.async is needed,
// by the thread that stored or by one that waited for it and then issues the read.
//
// Of every byte we keep who stored it and how many fences the block had executed by then. The byte
// may be read if its writer or the reader has fenced since. That the reader has waited for the
// writer is not checked here. Stores to other blocks of a cluster are not followed.
#pragma once
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {

// Whether a kernel, or a function it may call, reads shared memory through the async proxy.
bool reads_through_async_proxy(const Program& program, const Function& kernel);

// `bytes` at `written` have been stored by a lane, if they lie in its block's shared memory.
void note_generic_write(Warp& warp, int lane, const uint8_t* written, uint32_t bytes);

// An asynchronous copy has written them: whoever waits for it may read them in any way.
void note_async_write(Block& block, uint32_t offset, uint32_t bytes);

// Stops the launch if bytes of the block's shared memory lack the fence. A whole warp (lane -1) has
// fenced when any of its lanes has.
void check_async_read(Warp& warp, const Instruction& instruction, int lane, const Block& owner,
                      uint32_t offset, uint32_t bytes);

// Lanes execute fence.proxy.async.
void fence_async_proxy(Warp& warp, uint32_t mask);

}  // namespace mergeme::ptx
