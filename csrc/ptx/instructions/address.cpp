// Addresses between spaces and between the blocks of a cluster: cvta, isspacep, mapa, getctarank.
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

// A .shared::cluster address: the rank plus one of its block above the offset.
constexpr int kRankShift = 24;
constexpr uint64_t kOffsetMask = (uint64_t{1} << kRankShift) - 1;
// What no block's window holds, for a generic address that is not shared.
constexpr uint64_t kNotShared = 0x80000000;

uint64_t host(const void* p) { return reinterpret_cast<uint64_t>(p); }

uint64_t with_rank(uint64_t offset, uint32_t rank) {
  return (offset & kOffsetMask) | uint64_t{rank + 1} << kRankShift;
}

uint64_t to_space(Warp& warp, int lane, uint64_t address, Space space) {
  switch (space) {
    case Space::kShared: {
      const Block* owner = warp.shared_owner(address);
      if (!owner) return static_cast<uint32_t>(address | kNotShared);
      const uint64_t offset = address - host(owner->shared) + kSharedBase;
      return owner == warp.block ? offset : with_rank(offset, static_cast<uint32_t>(owner->rank));
    }
    case Space::kLocal:
      return address - host(warp.local_memory) - static_cast<uint64_t>(lane) * warp.local_bytes +
             kLocalBase;
    case Space::kParam:
      return address - host(warp.launch->parameters);
    default:
      return address;
  }
}

uint64_t to_generic(Warp& warp, const Instruction& instruction, int lane, uint64_t address) {
  switch (instruction.space) {
    case Space::kShared: {
      const Block* owner = warp.addressed_block(address);
      if (!owner) warp.fail(instruction, lane, "cvta: the address names no block of the cluster");
      return host(owner->shared) + (address & kOffsetMask) - kSharedBase;
    }
    case Space::kLocal:
      return address - kLocalBase + host(warp.local_memory) +
             static_cast<uint64_t>(lane) * warp.local_bytes;
    case Space::kParam:
      return address + host(warp.launch->parameters);
    default:
      return address;
  }
}

void cvta(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const Operand& source = instruction.operands[1];
  const uint64_t* a = row(warp, source);
  const uint64_t frame = source.in_frame ? warp.frame_local : 0;
  const bool from_generic = instruction.flag;
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = a[lane] + frame;
    d[lane] = from_generic ? to_space(warp, lane, address, instruction.space)
                           : to_generic(warp, instruction, lane, address);
  });
}

bool lies_in(Warp& warp, uint64_t address, Space space, bool any_block) {
  const Block* owner = warp.shared_owner(address);
  const bool local =
      warp.local_bytes && address - host(warp.local_memory) < kWarpSize * warp.local_bytes;
  const bool parameter = address - host(warp.launch->parameters) < warp.launch->parameter_bytes;
  const auto& ranges = warp.launch->ranges;
  const bool constant = std::any_of(ranges.begin(), ranges.end(), [&](const MemoryRange& range) {
    return range.space == Space::kConst && address >= range.begin && address < range.end;
  });
  switch (space) {
    case Space::kShared:
      return any_block ? owner != nullptr : owner == warp.block;
    case Space::kLocal:
      return local;
    case Space::kParam:
      return parameter;
    case Space::kConst:
      return constant;
    default:
      return !owner && !local && !parameter && !constant;
  }
}

void isspacep(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint64_t* a = row(warp, instruction.operands[1]);
  uint32_t lanes = 0;
  for_each_lane(mask, [&](int lane) {
    if (lies_in(warp, a[lane], instruction.space, instruction.flag)) lanes |= 1u << lane;
  });
  set_predicate(warp, instruction.operands[0], mask, lanes);
}

// The same place in another block's shared memory.
void mapa(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const std::vector<Block*>& cluster = *warp.block->cluster;
  for_each_lane(mask, [&](int lane) {
    const auto rank = static_cast<uint32_t>(b[lane]);
    if (rank >= cluster.size()) warp.fail(instruction, lane, "mapa: rank outside the cluster");
    if (instruction.space == Space::kShared) {
      d[lane] = with_rank(a[lane], rank);
      return;
    }
    const Block* owner = warp.shared_owner(a[lane]);
    if (!owner) warp.fail(instruction, lane, "mapa: not a shared address");
    d[lane] = a[lane] - host(owner->shared) + host(cluster[rank]->shared);
  });
}

void getctarank(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [&](int lane) {
    const Block* owner = instruction.space == Space::kShared ? warp.addressed_block(a[lane])
                                                             : warp.shared_owner(a[lane]);
    if (!owner) warp.fail(instruction, lane, "getctarank: not a shared address");
    d[lane] = static_cast<uint32_t>(owner->rank);
  });
}

}  // namespace

bool decode_address(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (op == "cvta") {
    i.flag = parsed.has("to");
    i.execute = cvta;
  } else if (op == "isspacep") {
    i.flag = parsed.has("shared::cluster");
    i.execute = isspacep;
  } else if (op == "mapa") {
    i.execute = mapa;
  } else if (op == "getctarank") {
    i.execute = getctarank;
  } else {
    return false;
  }
  i.space = space_of(parsed);
  return true;
}

}  // namespace mergeme::ptx
