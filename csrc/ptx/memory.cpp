// Where an access lands in the host's memory, or why it may not be made.
//
// .shared, .local and .param addresses are offsets; generic and .global ones are addresses of the
// host, so that pointers in kernel parameters and in tables need no translation.
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

// A .shared::cluster address carries its block's rank plus one above these bits.
constexpr uint32_t kOffsetBits = 24;
constexpr uint64_t kFirstPlausibleAddress = 65536;

bool is_misaligned(uint64_t address, uint32_t bytes) { return address & (bytes - 1); }

void check_writable(Warp& warp, const Instruction& instruction, int lane, const MemoryRange& range,
                    Access access) {
  if (access != Access::kRead && range.read_only)
    warp.fail(instruction, lane, "write to read-only buffer " + range.name);
}

// The buffer next to a stray address, and on which side of it the address lies.
std::string describe_nearest(const std::vector<MemoryRange>& ranges, uint64_t address,
                             uint32_t bytes) {
  constexpr uint64_t kTooFar = uint64_t{1} << 32;
  std::string nearest;
  uint64_t smallest = kTooFar;
  for (const MemoryRange& range : ranges) {
    const bool before = address < range.begin;
    const uint64_t distance = before ? range.begin - address : address + bytes - range.end;
    if (distance >= smallest) continue;
    smallest = distance;
    nearest = before ? concat(", ", distance, " bytes before buffer ", range.name)
                     : concat(", at byte ", address - range.begin, " of buffer ", range.name,
                              " of ", range.end - range.begin, " bytes");
  }
  return nearest;
}

}  // namespace

Block* Warp::addressed_block(uint64_t address) {
  const uint32_t rank_plus_one = static_cast<uint32_t>(address) >> kOffsetBits;
  if (rank_plus_one == 0) return block;
  return rank_plus_one <= block->cluster->size() ? (*block->cluster)[rank_plus_one - 1] : nullptr;
}

Block* Warp::shared_owner(uint64_t address) {
  const auto holds = [&](const Block& b) {
    return address - reinterpret_cast<uint64_t>(b.shared) < b.shared_bytes;
  };
  if (holds(*block)) return block;
  for (Block* other : *block->cluster)
    if (holds(*other)) return other;
  return nullptr;
}

uint8_t* Warp::resolve_shared(const Instruction& instruction, int lane, uint64_t address,
                              uint32_t bytes, Access access) {
  if (address >> 32)
    fail(instruction, lane, concat("shared address ", hex(address), " has bits above 32"));
  Block* owner = addressed_block(address);
  if (!owner)
    fail(instruction, lane,
         concat("shared::cluster address ", hex(address), " names no block of the cluster"));
  if (owner->done) fail(instruction, lane, "shared memory of a block that has exited");
  const uint64_t in_window = address & ((1u << kOffsetBits) - 1);
  const uint64_t offset = in_window - kSharedBase;
  if (in_window < kSharedBase || offset + bytes > owner->shared_bytes)
    fail(instruction, lane,
         concat("shared access of ", bytes, " bytes at offset ", static_cast<int64_t>(offset),
                " is outside the block's ", owner->shared_bytes, " bytes"));
  if (is_misaligned(offset, bytes))
    fail(instruction, lane,
         concat("misaligned shared access of ", bytes, " bytes at offset ", offset));
  touched_shared = true;
  if (launch->check_races)
    check_race(instruction, lane, *owner, static_cast<uint32_t>(offset), bytes, access);
  return owner->shared + offset;
}

uint8_t* Warp::resolve_global(const Instruction& instruction, int lane, uint64_t address,
                              uint32_t bytes, Access access) {
  touched_shared = false;
  if (is_misaligned(address, bytes))
    fail(instruction, lane,
         concat("misaligned global access of ", bytes, " bytes at ", hex(address)));
  const std::vector<MemoryRange>& ranges = launch->ranges;
  // Neighbouring accesses mostly go to one buffer.
  const auto is_in = [&](const MemoryRange& range) {
    return address >= range.begin && address + bytes <= range.end;
  };
  if (last_range < ranges.size() && is_in(ranges[last_range])) {
    check_writable(*this, instruction, lane, ranges[last_range], access);
    return reinterpret_cast<uint8_t*>(address);
  }
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address,
                       [](uint64_t a, const MemoryRange& range) { return a < range.begin; });
  if (after != ranges.begin() && is_in(*(after - 1))) {
    last_range = static_cast<size_t>(after - 1 - ranges.begin());
    check_writable(*this, instruction, lane, ranges[last_range], access);
    return reinterpret_cast<uint8_t*>(address);
  }
  if (address < kFirstPlausibleAddress)
    fail(instruction, lane, concat("NULL pointer access at ", hex(address)));
  fail(instruction, lane,
       concat("global ", access == Access::kRead ? "read" : "write", " of ", bytes, " bytes at ",
              hex(address), " is outside every registered buffer",
              describe_nearest(ranges, address, bytes)));
}

uint8_t* Warp::resolve_local(const Instruction& instruction, int lane, uint64_t address,
                             uint32_t bytes) {
  touched_shared = false;
  const uint64_t offset = address - kLocalBase;
  if (address < kLocalBase || offset + bytes > local_bytes)
    fail(instruction, lane, concat("local access outside the thread's ", local_bytes, " bytes"));
  if (is_misaligned(address, bytes)) fail(instruction, lane, "misaligned local access");
  return local_memory + static_cast<uint64_t>(lane) * local_bytes + offset;
}

uint8_t* Warp::resolve_param(const Instruction& instruction, int lane, uint64_t address,
                             uint32_t bytes, Access access) {
  touched_shared = false;
  Frame& frame = *frames.back();
  if (frames.size() == 1 && !instruction.call_param) {
    if (address + bytes > launch->parameter_bytes)
      fail(instruction, lane,
           concat("parameter access at byte ", address, " beyond the ", launch->parameter_bytes,
                  " bytes passed"));
    if (access != Access::kRead) fail(instruction, lane, "write to kernel parameters");
    return const_cast<uint8_t*>(launch->parameters) + address;
  }
  if (address + bytes > frame.param_bytes())
    fail(instruction, lane, "call parameter access out of range");
  return frame.params.data() + lane * frame.param_bytes() + address;
}

uint8_t* Warp::resolve_generic(const Instruction& instruction, int lane, uint64_t address,
                               uint32_t bytes, Access access) {
  if (Block* owner = shared_owner(address)) {
    touched_shared = true;
    const uint64_t offset = address - reinterpret_cast<uint64_t>(owner->shared);
    if (offset + bytes > owner->shared_bytes)
      fail(instruction, lane, "shared (generic) access outside the block's shared memory");
    if (is_misaligned(offset, bytes))
      fail(instruction, lane,
           concat("misaligned shared access of ", bytes, " bytes at offset ", offset));
    if (launch->check_races)
      check_race(instruction, lane, *owner, static_cast<uint32_t>(offset), bytes, access);
    return reinterpret_cast<uint8_t*>(address);
  }
  const uint64_t in_locals = address - reinterpret_cast<uint64_t>(local_memory);
  if (local_bytes && in_locals < kWarpSize * local_bytes) {
    touched_shared = false;
    if (in_locals / local_bytes != static_cast<uint64_t>(lane))
      fail(instruction, lane, "access to another thread's local memory");
    if (in_locals % local_bytes + bytes > local_bytes)
      fail(instruction, lane, "local access out of range");
    if (is_misaligned(address, bytes)) fail(instruction, lane, "misaligned local access");
    return reinterpret_cast<uint8_t*>(address);
  }
  return resolve_global(instruction, lane, address, bytes, access);
}

uint8_t* Warp::resolve(const Instruction& instruction, int lane, uint64_t address, uint32_t bytes,
                       Space space, Access access) {
  switch (space) {
    case Space::kShared:
      return resolve_shared(instruction, lane, address, bytes, access);
    case Space::kGlobal:
      return resolve_global(instruction, lane, address, bytes, access);
    case Space::kConst:
      if (access != Access::kRead) fail(instruction, lane, "write to constant memory");
      return resolve_global(instruction, lane, address, bytes, access);
    case Space::kLocal:
      return resolve_local(instruction, lane, address, bytes);
    case Space::kParam:
      return resolve_param(instruction, lane, address, bytes, access);
    case Space::kGeneric:
      break;
  }
  return resolve_generic(instruction, lane, address, bytes, access);
}

}  // namespace mergeme::ptx
