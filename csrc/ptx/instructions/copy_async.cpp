// cp.async: 4, 8 or 16 bytes from global to shared memory. They arrive when the lane that copies
// waits for them, and the target holds poison until then.
#include "csrc/ptx/instructions/async_copy.h"
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr uint64_t kAll = ~uint64_t{0};

// How many bytes are read: src-size, none where ignore-src is true, or all.
uint32_t source_bytes(Warp& warp, const Instruction& instruction, int lane) {
  const auto all = static_cast<uint32_t>(instruction.immediate);
  if (instruction.num_operands < 4) return all;
  const Operand& operand = instruction.operands[3];
  if (operand.kind == OperandKind::kPredicate)
    return true_lanes(warp, operand, 1u << lane) ? 0 : all;
  const auto bytes = static_cast<uint32_t>(row(warp, operand)[lane]);
  if (bytes > all) warp.fail(instruction, lane, "cp.async src-size exceeds cp-size");
  return bytes;
}

// Every byte of the source must lie in a buffer; checked in the largest aligned pieces.
void check_source(Warp& warp, const Instruction& instruction, int lane, uint64_t address,
                  uint32_t bytes) {
  while (bytes) {
    uint32_t piece = std::bit_floor(bytes);
    if (address & (piece - 1)) piece = 1;
    warp.resolve_global(instruction, lane, address, piece, Access::kRead);
    address += piece;
    bytes -= piece;
  }
}

void copy(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const auto bytes = static_cast<uint32_t>(instruction.immediate);
  uint64_t sources[kWarpSize];
  uint64_t targets[kWarpSize];
  uint32_t reading = 0;
  for_each_lane(mask, [&](int lane) {
    targets[lane] = address_of(warp, instruction, 0, lane);
    sources[lane] = address_of(warp, instruction, 1, lane);
    const uint32_t from_source = source_bytes(warp, instruction, lane);
    uint8_t* target =
        warp.resolve(instruction, lane, targets[lane], bytes, Space::kShared, Access::kWrite);
    if (sources[lane] & (bytes - 1))
      warp.fail(instruction, lane, concat("misaligned cp.async source ", hex(sources[lane])));
    check_source(warp, instruction, lane, sources[lane], from_source);
    if (from_source) reading |= 1u << lane;
    const auto offset = static_cast<uint32_t>(target - warp.block->shared);
    warp.note_copy(offset, bytes, 1);
    poison(target, bytes);
    warp.async_copies[lane].push_back(
        {offset, sources[lane], bytes, from_source, warp.async_group[lane], warp.async_sequence});
  });
  warp.async_sequence++;
  if (!warp.launch->options.statistics) return;
  warp.count_global(sources, reading, bytes, false);
  warp.count_shared(targets, mask, bytes);
}

void commit_group(Warp& warp, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { warp.async_group[lane]++; });
}

// The latest groups, as many as `immediate` says, may stay under way.
void wait_group(Warp& warp, const Instruction& instruction, uint32_t mask) {
  warp.current = &instruction;
  const auto allowed = static_cast<uint64_t>(instruction.immediate);
  for_each_lane(mask, [&](int lane) {
    const uint64_t committed = warp.async_group[lane];
    warp.land_async_copies(lane, committed >= allowed ? committed - allowed : 0, kAll);
  });
}

void wait_all(Warp& warp, const Instruction& instruction, uint32_t mask) {
  warp.current = &instruction;
  for_each_lane(mask, [&](int lane) { warp.land_async_copies(lane, kAll, kAll); });
}

}  // namespace

void poison(uint8_t* to, uint64_t bytes) {
  constexpr int kPatternBytes = sizeof kPoison;
  const auto phase = reinterpret_cast<uint64_t>(to);
  for (uint64_t i = 0; i < bytes; i++)
    to[i] = static_cast<uint8_t>(kPoison >> (8 * ((phase + i) % kPatternBytes)));
}

void Warp::land_async_copies(int lane, uint64_t below_group, uint64_t below_sequence) {
  std::vector<AsyncCopy>& copies = async_copies[lane];
  size_t under_way = 0;  // those that stay, moved to the front
  for (const AsyncCopy& copy : copies) {
    if (copy.group >= below_group || copy.sequence >= below_sequence) {
      copies[under_way++] = copy;
      continue;
    }
    uint8_t* target = block->shared + copy.destination;
    std::memcpy(target, reinterpret_cast<const void*>(copy.source), copy.source_bytes);
    std::memset(target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    note_generic_write(*this, lane, target, copy.bytes);
    note_copy(copy.destination, copy.bytes, -1);
    if (launch->check_races && current)
      check_race(*current, lane, *block, copy.destination, copy.bytes, Access::kWrite);
  }
  copies.resize(under_way);
}

bool decode_copy_async(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode != "cp" || !parsed.has("async")) return false;
  if (parsed.has("bulk") || parsed.has("mbarrier")) return false;
  if (parsed.has("commit_group")) {
    i.execute = commit_group;
  } else if (parsed.has("wait_all")) {
    i.execute = wait_all;
  } else if (parsed.has("wait_group")) {
    i.immediate = static_cast<int>(parsed.operands[0].integer);
    i.execute = wait_group;
  } else {
    if (parsed.operands.size() < 3) return false;
    i.immediate = static_cast<int>(parsed.operands[2].integer);
    if (i.immediate != 4 && i.immediate != 8 && i.immediate != 16) return false;
    // The fourth operand is a cache policy if the mnemonic has one, and no source size.
    if (parsed.operands.size() == 4 && parsed.has_prefix("L2::cache_hint")) i.num_operands = 3;
    i.execute = copy;
  }
  return true;
}

}  // namespace mergeme::ptx
