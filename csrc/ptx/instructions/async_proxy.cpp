#include "csrc/ptx/instructions/async_proxy.h"

#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

// A byte's writer, and the number of fences before, in one word; 0 for none.
constexpr int kThreadBits = 10;
constexpr uint32_t kThreadMask = (1u << kThreadBits) - 1;

bool reads_through_async_proxy(const ParsedFunction& function) {
  return std::any_of(function.parsed.begin(), function.parsed.end(),
                     [](const ParsedInstruction& instruction) {
                       return instruction.opcode == "wgmma" ||
                              (instruction.opcode == "cp" && instruction.has("bulk"));
                     });
}

uint32_t last_fence(const Warp& warp, int lane) {
  if (lane >= 0) return warp.proxy_fence[lane];
  return *std::max_element(warp.proxy_fence.begin(), warp.proxy_fence.end());
}

}  // namespace

bool reads_through_async_proxy(const Program& program, const Function& kernel) {
  if (reads_through_async_proxy(kernel)) return true;
  return std::any_of(program.functions.begin(), program.functions.end(),
                     [](const Function* function) {
                       return !function->is_entry && reads_through_async_proxy(*function);
                     });
}

void note_generic_write(Warp& warp, int lane, const uint8_t* written, uint32_t bytes) {
  if (!warp.launch->checks_proxies) return;
  Block& block = *warp.block;
  const auto offset = static_cast<uint64_t>(written - block.shared);
  if (offset >= block.shared_bytes) return;
  if (block.generic_writes.empty()) block.generic_writes.resize(block.shared_bytes);
  const auto thread = static_cast<uint32_t>(warp.id * kWarpSize + lane);
  const uint32_t record = block.proxy_fences << kThreadBits | thread;
  std::fill_n(block.generic_writes.begin() + static_cast<int64_t>(offset), bytes, record);
}

void note_async_write(Block& block, uint32_t offset, uint32_t bytes) {
  if (block.generic_writes.empty()) return;
  std::fill_n(block.generic_writes.begin() + offset, bytes, 0);
}

void check_async_read(Warp& warp, const Instruction& instruction, int lane, const Block& owner,
                      uint32_t offset, uint32_t bytes) {
  if (owner.generic_writes.empty()) return;
  const uint32_t reader_fence = &owner == warp.block ? last_fence(warp, lane) : 0;
  uint32_t known_good = 0;  // neighbours mostly have one writer
  for (uint32_t at = offset; at < offset + bytes; at++) {
    const uint32_t record = owner.generic_writes[at];
    if (record == 0 || record == known_good) continue;
    const uint32_t fences_before = record >> kThreadBits;
    const auto thread = static_cast<int>(record & kThreadMask);
    const Warp& writer = *owner.warps[thread / kWarpSize];
    if (reader_fence <= fences_before && writer.proxy_fence[thread % kWarpSize] <= fences_before)
      warp.fail(instruction, lane,
                concat("missing fence.proxy.async: thread ", thread, " stored to shared offset ",
                       at, ", which is now read through the async proxy"));
    known_good = record;
  }
}

void fence_async_proxy(Warp& warp, uint32_t mask) {
  const uint32_t number = ++warp.block->proxy_fences;
  for_each_lane(mask, [&](int lane) { warp.proxy_fence[lane] = number; });
}

}  // namespace mergeme::ptx
