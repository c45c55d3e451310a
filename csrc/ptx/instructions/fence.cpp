// Fences, and what has no effect on a kernel's results: prefetches, hints, dependent launches.
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

// Memory is sequentially consistent here, so that a fence between threads changes nothing.
void fence(Warp& warp, const Instruction&, uint32_t) { warp.launch->statistics.fences++; }

void proxy_fence(Warp& warp, const Instruction& instruction, uint32_t mask) {
  fence(warp, instruction, mask);
  fence_async_proxy(warp, mask);
}

void no_operation(Warp&, const Instruction&, uint32_t) {}

void create_policy(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  for_each_lane(mask, [=](int lane) { d[lane] = 0; });
}

// The number of registers is checked; how many a block's warps have in sum is ptxas's to know.
void set_max_registers(Warp& warp, const Instruction& instruction, uint32_t) {
  constexpr int kStep = 8;
  constexpr int kLeast = 24;
  constexpr int kMost = 256;
  const int count = instruction.immediate;
  if (count < kLeast || count > kMost || count % kStep)
    warp.fail(instruction, -1,
              concat("setmaxnreg of ", count, " registers, not a multiple of 8 from 24 to 256"));
}

// Whether a fence.proxy orders stores to shared memory before reads through the async proxy.
bool covers_shared(const ParsedInstruction& parsed) {
  return parsed.has("proxy") && parsed.has("async") && !parsed.has("global");
}

}  // namespace

bool decode_fence(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (op == "fence" || op == "membar") {
    i.execute = covers_shared(parsed) ? proxy_fence : fence;
  } else if (op == "setmaxnreg") {
    i.immediate = static_cast<int>(parsed.operands[0].integer);
    i.control = Control::kWarpSync;
    i.aligned = true;
    i.execute = set_max_registers;
  } else if (op == "createpolicy") {
    i.execute = create_policy;
  } else if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard" ||
             op == "griddepcontrol" || op == "pmevent" || op == "brkpt") {
    i.execute = no_operation;
  } else {
    return false;
  }
  return true;
}

}  // namespace mergeme::ptx
