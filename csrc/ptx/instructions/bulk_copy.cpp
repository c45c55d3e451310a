// cp.async.bulk and cp.reduce.async.bulk: whole pieces of memory by the copy engine.
#include "csrc/ptx/instructions/bulk_copy.h"

#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/instructions/reduction.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr uint32_t kUnit = 16;  // sizes and addresses are multiples of it

// Operands: destination, source, size, then mbarrier and multicast mask where there are any.
constexpr int kDestination = 0;
constexpr int kSource = 1;
constexpr int kSize = 2;
constexpr int kMBarrier = 3;
constexpr int kMulticast = 4;

// The host's address of `bytes` that all must be there.
uint8_t* resolve_piece(Warp& warp, const Instruction& instruction, int lane, int operand,
                       uint32_t bytes, Space space, Access access) {
  const uint64_t address = address_of(warp, instruction, operand, lane);
  if (address % kUnit) warp.fail(instruction, lane, "misaligned cp.async.bulk address");
  uint8_t* first = warp.resolve(instruction, lane, address, kUnit, space, access);
  for (uint32_t at = kUnit; at < bytes; at += kUnit)
    warp.resolve(instruction, lane, address + at, kUnit, space, access);
  return first;
}

void check_source_fence(Warp& warp, const Instruction& instruction, int lane, const uint8_t* source,
                        uint32_t bytes) {
  const Block& block = *warp.block;
  const auto offset = static_cast<uint64_t>(source - block.shared);
  if (offset < block.shared_bytes)
    check_async_read(warp, instruction, lane, block, static_cast<uint32_t>(offset), bytes);
}

uint32_t size_in_bytes(Warp& warp, const Instruction& instruction, int lane) {
  const auto bytes = static_cast<uint32_t>(row(warp, instruction.operands[kSize])[lane]);
  if (bytes % kUnit) warp.fail(instruction, lane, "cp.async.bulk size is not a multiple of 16");
  return bytes;
}

// To shared memory, from global memory or from the block's own shared memory.
void load_lane(Warp& warp, const Instruction& instruction, int lane) {
  const uint32_t bytes = size_in_bytes(warp, instruction, lane);
  if (bytes == 0) return;
  const bool from_shared = instruction.space == Space::kShared;
  const uint8_t* source =
      resolve_piece(warp, instruction, lane, kSource, bytes, instruction.space, Access::kRead);
  if (from_shared) check_source_fence(warp, instruction, lane, source, bytes);
  uint8_t* destination =
      resolve_piece(warp, instruction, lane, kDestination, bytes, Space::kShared, Access::kWrite);
  Block* addressed = warp.addressed_block(address_of(warp, instruction, kDestination, lane));
  const auto offset = static_cast<uint32_t>(destination - addressed->shared);
  const bool reduces = instruction.flag;
  const Reduction reduction = instruction.reduction;
  const Type type = instruction.type;
  for (Block* target : load_targets(warp, instruction, lane, addressed, kMulticast)) {
    uint8_t* to = target->shared + offset;
    if (!reduces) poison(to, bytes);
    begin_load(warp, instruction, lane, kMBarrier, *target, bytes, [=] {
      note_async_write(*target, offset, bytes);
      if (!reduces) {
        std::memcpy(to, source, bytes);
        return;
      }
      for (uint32_t at = 0; at < bytes; at += size_of(type))
        reduce_in_place(reduction, type, to + at, source + at);
    });
  }
}

// From shared to global memory.
void store_lane(Warp& warp, const Instruction& instruction, int lane) {
  const uint32_t bytes = size_in_bytes(warp, instruction, lane);
  if (bytes == 0) return;
  const uint8_t* source =
      resolve_piece(warp, instruction, lane, kSource, bytes, Space::kShared, Access::kRead);
  check_source_fence(warp, instruction, lane, source, bytes);
  uint8_t* destination =
      resolve_piece(warp, instruction, lane, kDestination, bytes, Space::kGlobal, Access::kWrite);
  const auto buffer = std::make_shared<std::vector<uint8_t>>(bytes);
  const bool reduces = instruction.flag;
  const Reduction reduction = instruction.reduction;
  const Type type = instruction.type;
  begin_store(
      warp, lane, bytes, [=] { std::memcpy(buffer->data(), source, bytes); },
      [=] {
        if (!reduces) {
          std::memcpy(destination, buffer->data(), bytes);
          return;
        }
        for (uint32_t at = 0; at < bytes; at += size_of(type))
          reduce_in_place(reduction, type, destination + at, buffer->data() + at);
      });
}

void load(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { load_lane(warp, instruction, lane); });
}
void store(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { store_lane(warp, instruction, lane); });
}

void commit_group(Warp& warp, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { warp.bulk_group[lane]++; });
}

// The latest groups, as many as `immediate` says, may stay under way; with .read it is enough that
// the others have read their source.
void wait_group(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const auto allowed = static_cast<uint64_t>(instruction.immediate);
  for_each_lane(mask, [&](int lane) {
    const uint64_t committed = warp.bulk_group[lane];
    warp.land_bulk_stores(lane, committed >= allowed ? committed - allowed : 0, instruction.flag);
  });
}

// st.async: a store to a block of the cluster that counts on its mbarrier when it has landed.
void store_async(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const int bytes = instruction.element_size;
  const int count = instruction.vector_size;
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = address_of(warp, instruction, 0, lane);
    uint8_t* to =
        warp.resolve(instruction, lane, address, count * bytes, Space::kShared, Access::kWrite);
    Block* target = warp.addressed_block(address);
    std::vector<uint64_t> values;
    for (int k = 0; k < count; k++)
      values.push_back(row(warp, element(instruction, instruction.operands[1], k))[lane]);
    poison(to, static_cast<uint64_t>(count * bytes));
    begin_load(warp, instruction, lane, 2, *target, static_cast<uint32_t>(count * bytes),
               [=, width = static_cast<size_t>(bytes)] {
                 for (size_t k = 0; k < values.size(); k++)
                   std::memcpy(to + k * width, &values[k], width);
               });
  });
}

void no_operation(Warp&, const Instruction&, uint32_t) {}

bool decode_copy(const ParsedInstruction& parsed, Instruction& i) {
  // Of the two spaces in the mnemonic the destination's comes first.
  const auto is_global = [](const std::string& m) { return m == "global"; };
  const auto is_shared = [](const std::string& m) { return m.starts_with("shared"); };
  const auto& modifiers = parsed.modifiers;
  const auto global = std::find_if(modifiers.begin(), modifiers.end(), is_global);
  const auto shared = std::find_if(modifiers.begin(), modifiers.end(), is_shared);
  const bool stores = global < shared;
  i.space = global == modifiers.end() ? Space::kShared : Space::kGlobal;
  i.flag = parsed.has("reduce");
  if (i.flag && !decode_reduction(parsed, i.reduction)) return false;
  i.multicast = parsed.has("multicast::cluster");
  i.execute = stores ? store : load;
  return true;
}

}  // namespace

std::vector<Block*> load_targets(Warp& warp, const Instruction& instruction, int lane,
                                 Block* addressed, int mask_operand) {
  if (!instruction.multicast) return {addressed};
  const auto mask = static_cast<uint16_t>(row(warp, instruction.operands[mask_operand])[lane]);
  std::vector<Block*> targets;
  const std::vector<Block*>& cluster = *warp.block->cluster;
  for (size_t rank = 0; rank < cluster.size(); rank++)
    if ((mask >> rank) & 1) targets.push_back(cluster[rank]);
  if (mask == 0 || (mask >> cluster.size()) != 0)
    warp.fail(instruction, lane,
              concat("multicast mask ", hex(mask),
                     " names no block, or one outside the cluster of ", cluster.size()));
  return targets;
}

void begin_load(Warp& warp, const Instruction& instruction, int lane, int mbarrier_operand,
                Block& target, uint32_t bytes, std::function<void()> land) {
  const MBarrierPlace place = find_mbarrier(warp, instruction, lane, Space::kShared,
                                            address_of(warp, instruction, mbarrier_operand, lane));
  if (!instruction.multicast && place.block != &target)
    warp.fail(instruction, lane, "the mbarrier of a copy must lie in the block it goes to");
  auto copy = std::make_unique<BulkCopy>();
  copy->mbarrier_block = &target;
  copy->mbarrier = place.offset;
  copy->bytes = bytes;
  copy->read = [] {};
  copy->land = std::move(land);
  warp.block->bulk_copies.push_back(std::move(copy));
  warp.launch->progress++;
  warp.launch->statistics.bulk.copies++;
  warp.launch->statistics.bulk.bytes_loaded += bytes;
}

void begin_store(Warp& warp, int lane, uint32_t bytes, std::function<void()> read,
                 std::function<void()> land) {
  auto copy = std::make_unique<BulkCopy>();
  copy->group = warp.bulk_group[lane];
  copy->read = [read = std::move(read), copy = copy.get()] {
    if (!copy->was_read) read();
    copy->was_read = true;
  };
  copy->land = std::move(land);
  if (warp.launch->reverse_lanes) copy->read();
  warp.bulk_copies[lane].push_back(copy.get());
  warp.block->bulk_copies.push_back(std::move(copy));
  warp.launch->progress++;
  warp.launch->statistics.bulk.copies++;
  warp.launch->statistics.bulk.bytes_stored += bytes;
}

void Warp::land_bulk_stores(int lane, uint64_t below_group, bool only_read) {
  std::vector<BulkCopy*> under_way;
  for (BulkCopy* copy : bulk_copies[lane]) {
    if (copy->group >= below_group) {
      under_way.push_back(copy);
      continue;
    }
    copy->read();
    if (only_read) {
      under_way.push_back(copy);
      continue;
    }
    copy->land();
    std::erase_if(block->bulk_copies,
                  [=](const std::unique_ptr<BulkCopy>& owned) { return owned.get() == copy; });
  }
  bulk_copies[lane].swap(under_way);
}

bool decode_bulk_copy(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode == "st" && parsed.has("async") && parsed.has_prefix("mbarrier")) {
    const Operand& data = i.operands[1];
    i.vector_size = data.kind == OperandKind::kVector ? static_cast<uint8_t>(data.count) : 1;
    i.element_size = static_cast<uint8_t>(size_of(i.type));
    i.execute = store_async;
    return parsed.operands.size() == 3;
  }
  if (parsed.opcode != "cp" || !parsed.has("bulk")) return false;
  if (parsed.has("commit_group")) {
    i.execute = commit_group;
  } else if (parsed.has("wait_group")) {
    i.immediate = static_cast<int>(parsed.operands[0].integer);
    i.flag = parsed.has("read");
    i.execute = wait_group;
  } else if (parsed.has("prefetch")) {
    i.execute = no_operation;
  } else if (parsed.has("tensor")) {
    return false;  // tensor_copy.cpp
  } else {
    return decode_copy(parsed, i);
  }
  return true;
}

}  // namespace mergeme::ptx
