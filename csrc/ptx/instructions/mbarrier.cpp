// mbarrier: phases that end when the expected arrivals and bytes have come.
#include "csrc/ptx/instructions/async_copy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr uint32_t kBytes = 8;
constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr uint64_t kAll = ~uint64_t{0};

std::string name_of(uint32_t offset) { return concat("mbarrier at shared offset ", offset); }

// Writes what stands for the state into shared memory, where a stray store will be noticed.
void publish(Block& block, uint32_t offset, MBarrier& state) {
  constexpr uint64_t kMark = 0x4d42;
  constexpr uint64_t kField = 0xfff;
  state.opaque = kMark << 48 | (state.phase & kField) << 36 | (state.expected & kField) << 24 |
                 (state.pending & kField) << 12 |
                 (static_cast<uint64_t>(state.pending_bytes) & kField);
  std::memcpy(block.shared + offset, &state.opaque, sizeof state.opaque);
  block.launch->progress++;
}

uint64_t value_of(const Warp& warp, const Instruction& instruction, int k, int lane) {
  return row(warp, instruction.operands[k])[lane];
}

// The operand that is the barrier's address: `immediate` of every instruction here. Values follow.
uint64_t barrier_address(const Warp& warp, const Instruction& instruction, int lane) {
  return address_of(warp, instruction, instruction.immediate, lane);
}

MBarrierPlace barrier_of(Warp& warp, const Instruction& instruction, int lane) {
  return find_mbarrier(warp, instruction, lane, instruction.space,
                       barrier_address(warp, instruction, lane));
}

void init(Warp& warp, const Instruction& instruction, uint32_t mask) {
  Block& block = *warp.block;
  for_each_lane(mask, [&](int lane) {
    const uint8_t* memory =
        warp.resolve(instruction, lane, barrier_address(warp, instruction, lane), kBytes,
                     instruction.space, Access::kWrite);
    const auto offset = static_cast<uint64_t>(memory - block.shared);
    if (offset >= block.shared_bytes)
      warp.fail(instruction, lane, "mbarrier.init outside the block's own shared memory");
    const auto count =
        static_cast<uint32_t>(value_of(warp, instruction, instruction.immediate + 1, lane));
    if (count == 0 || count > kMaxCount)
      warp.fail(instruction, lane, concat("mbarrier.init with count ", count));
    MBarrier& state = block.mbarriers[static_cast<uint32_t>(offset)];
    state = {.pending = count, .expected = count, .pending_bytes = 0, .phase = 0, .opaque = 0};
    publish(block, static_cast<uint32_t>(offset), state);
    block.complex_sync = true;
  });
}

void inval(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const MBarrierPlace place = barrier_of(warp, instruction, lane);
    place.block->mbarriers.erase(place.offset);
  });
}

void expect_tx(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const MBarrierPlace place = barrier_of(warp, instruction, lane);
    place.state->pending_bytes +=
        static_cast<uint32_t>(value_of(warp, instruction, instruction.immediate + 1, lane));
    publish(*place.block, place.offset, *place.state);
  });
}

void complete_tx(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const MBarrierPlace place = barrier_of(warp, instruction, lane);
    place.state->pending_bytes -=
        static_cast<uint32_t>(value_of(warp, instruction, instruction.immediate + 1, lane));
    update_mbarrier(*place.block, place.offset, *place.state);
  });
}

enum ArriveFlags : uint8_t { kExpectsBytes = 1, kDrops = 2 };

// arrive and arrive_drop: of `count` threads, or of one that first expects bytes. The token that is
// returned is the phase.
void arrive(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const int value = instruction.immediate + 1;
  const bool expects_bytes = instruction.variant & kExpectsBytes;
  const bool has_value = value < instruction.num_operands;
  const bool returns_token =
      instruction.immediate == 1 && instruction.operands[0].kind != OperandKind::kSink;
  for_each_lane(mask, [&](int lane) {
    const MBarrierPlace place = barrier_of(warp, instruction, lane);
    MBarrier& state = *place.state;
    uint32_t count = 1;
    if (has_value) {
      const auto operand = static_cast<uint32_t>(value_of(warp, instruction, value, lane));
      if (expects_bytes)
        state.pending_bytes += operand;
      else
        count = operand;
    }
    if (count > state.pending)
      warp.fail(instruction, lane,
                name_of(place.offset) + ": more arrivals than its count in one phase");
    const uint64_t token = state.phase;
    if (instruction.variant & kDrops) state.expected -= count;
    state.pending -= count;
    update_mbarrier(*place.block, place.offset, state);
    if (returns_token) result_row(warp, instruction.operands[0])[lane] = token;
  });
}

// cp.async.mbarrier.arrive: due when the lane's copies so far have landed. Without .noinc the phase
// expects one arrival more.
void arrive_after_copies(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const MBarrierPlace place = barrier_of(warp, instruction, lane);
    if (place.block != warp.block)
      warp.fail(instruction, lane, "cp.async.mbarrier.arrive on another block's mbarrier");
    if (!instruction.flag) place.state->pending++;
    publish(*place.block, place.offset, *place.state);
    warp.block->pending_arrivals.push_back({place.offset, &warp, lane, warp.async_sequence});
  });
}

// test_wait and try_wait, by the phase's token or its parity. A wait that fails is what lets copies
// land: they never arrive before they are needed.
void wait(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const bool by_parity = instruction.flag;
  uint32_t done_lanes = 0;
  warp.wait_failed = false;
  for_each_lane(mask, [&](int lane) {
    const MBarrierPlace place = barrier_of(warp, instruction, lane);
    const uint64_t awaited = value_of(warp, instruction, instruction.immediate + 1, lane);
    const auto done = [&] {
      const uint64_t phase = place.state->phase;
      return by_parity ? (phase & 1) != (awaited & 1) : phase != awaited;
    };
    if (!done()) place.block->complete_async_work(place.offset);
    if (done())
      done_lanes |= 1u << lane;
    else
      warp.wait_failed = true;
  });
  set_predicate(warp, instruction.operands[0], mask, done_lanes);
}

// Its result is only promised for states that arrive.noComplete has returned; we give none.
void pending_count(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  for_each_lane(mask, [=](int lane) { d[lane] = 0; });
}

Handler decode_operation(const ParsedInstruction& parsed, Instruction& i) {
  const bool expects_bytes = parsed.has("expect_tx");
  if (parsed.has("init")) return init;
  if (parsed.has("inval")) return inval;
  if (parsed.has("arrive") || parsed.has("arrive_drop")) {
    i.variant = static_cast<uint8_t>((expects_bytes ? kExpectsBytes : 0) |
                                     (parsed.has("arrive_drop") ? kDrops : 0));
    return arrive;
  }
  if (expects_bytes) return expect_tx;
  if (parsed.has("complete_tx")) return complete_tx;
  if (parsed.has("test_wait") || parsed.has("try_wait")) {
    i.flag = parsed.has("parity");
    i.control = Control::kTryWait;
    return wait;
  }
  return nullptr;
}

}  // namespace

MBarrierPlace find_mbarrier(Warp& warp, const Instruction& instruction, int lane, Space space,
                            uint64_t address) {
  MBarrierPlace place{};
  uint64_t offset = 0;
  if (space == Space::kShared) {
    constexpr uint64_t kOffsetMask = 0xffffff;
    place.block = warp.addressed_block(address);
    if (!place.block) warp.fail(instruction, lane, "mbarrier address outside the cluster");
    offset = (address & kOffsetMask) - kSharedBase;
  } else {
    place.block = warp.shared_owner(address);
    if (!place.block) warp.fail(instruction, lane, "mbarrier is not in shared memory");
    offset = address - reinterpret_cast<uint64_t>(place.block->shared);
  }
  if (offset + kBytes > place.block->shared_bytes)
    warp.fail(instruction, lane, "mbarrier outside shared memory");
  if (offset % kBytes) warp.fail(instruction, lane, "misaligned mbarrier");
  if (place.block->done) warp.fail(instruction, lane, "mbarrier of a block that has exited");
  place.offset = static_cast<uint32_t>(offset);
  place.block->complex_sync = true;
  warp.block->complex_sync = true;
  const auto found = place.block->mbarriers.find(place.offset);
  if (found == place.block->mbarriers.end())
    warp.fail(instruction, lane, name_of(place.offset) + " was not initialised");
  place.state = &found->second;
  uint64_t in_memory = 0;
  std::memcpy(&in_memory, place.block->shared + offset, sizeof in_memory);
  if (in_memory != place.state->opaque)
    warp.fail(instruction, lane, name_of(place.offset) + " was overwritten");
  return place;
}

void update_mbarrier(Block& block, uint32_t offset, MBarrier& state) {
  if (state.pending == 0 && state.pending_bytes == 0) {
    state.phase++;
    state.pending = state.expected;
  }
  publish(block, offset, state);
}

void Block::complete_async_work(uint32_t mbarrier) {
  // Finished work leaves its list before the barrier hears of it.
  for (size_t k = 0; k < pending_arrivals.size();) {
    const PendingArrival arrival = pending_arrivals[k];
    if (arrival.mbarrier != mbarrier) {
      k++;
      continue;
    }
    pending_arrivals.erase(pending_arrivals.begin() + static_cast<int64_t>(k));
    arrival.warp->land_async_copies(arrival.lane, kAll, arrival.sequence);
    const auto found = mbarriers.find(mbarrier);
    if (found == mbarriers.end()) continue;
    found->second.pending--;
    update_mbarrier(*this, mbarrier, found->second);
  }
  for (Block* issuer : *cluster) {
    auto& copies = issuer->bulk_copies;
    for (size_t k = 0; k < copies.size();) {
      if (copies[k]->mbarrier_block != this || copies[k]->mbarrier != mbarrier) {
        k++;
        continue;
      }
      const std::unique_ptr<BulkCopy> copy = std::move(copies[k]);
      copies.erase(copies.begin() + static_cast<int64_t>(k));
      copy->read();
      copy->land();
      const auto found = mbarriers.find(mbarrier);
      if (found == mbarriers.end()) continue;
      found->second.pending_bytes -= copy->bytes;
      update_mbarrier(*this, mbarrier, found->second);
    }
  }
}

bool decode_mbarrier(const ParsedInstruction& parsed, Instruction& i) {
  const bool after_copies = parsed.opcode == "cp" && parsed.has("mbarrier") && parsed.has("arrive");
  if (parsed.opcode != "mbarrier" && !after_copies) return false;
  if (parsed.has("pending_count")) {
    i.execute = pending_count;
    return true;
  }
  const auto is_address = [](const ParsedOperand& operand) {
    return operand.kind == OperandKind::kAddress;
  };
  const auto address = std::find_if(parsed.operands.begin(), parsed.operands.end(), is_address);
  if (address == parsed.operands.end()) return false;
  i.immediate = static_cast<int>(address - parsed.operands.begin());
  i.space = space_of(parsed);
  if (after_copies) {
    i.flag = parsed.has("noinc");
    i.execute = arrive_after_copies;
  } else {
    i.execute = decode_operation(parsed, i);
  }
  return i.execute != nullptr;
}

}  // namespace mergeme::ptx
