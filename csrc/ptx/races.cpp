// Hazards in shared memory. Two accesses to a byte, one of them a write, are in order if a barrier
// of the whole block lies between them; if one warp makes both and a warp barrier lies between; or
// if one lane or one instruction makes both. And nobody may write where an asynchronous copy is on
// its way.
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr int16_t kAtomic = -2;   // a warp's place: an atomic of any warp
constexpr int16_t kSeveral = -1;  // a warp's or a lane's: more than one
constexpr size_t kMaxExamples = 20;

struct Hazard {
  const char* kind = nullptr;
  uint32_t other_line = 0;
};

// Whether another lane of the same warp touched the bytes, with no barrier since.
bool unordered_lanes(const Touch& before, const Touch& now) {
  return before.epoch == now.epoch && before.warp == now.warp && before.lane != now.lane &&
         before.warp_barriers == now.warp_barriers && before.serial != now.serial;
}
// Whether the bytes were last written by atomics of this warp alone, before its last warp barrier.
bool own_atomics(const ShadowGranule& granule, const Touch& now) {
  return granule.write.warp == kAtomic && granule.atomic_warp == now.warp &&
         granule.write.warp_barriers != now.warp_barriers;
}

void note_read(ShadowGranule& granule, const Touch& now, Hazard& hazard) {
  if (unordered_lanes(granule.write, now))
    hazard = {"read after another lane's write", granule.write.line};
  if (granule.write.epoch == now.epoch && granule.write.warp != now.warp &&
      !own_atomics(granule, now))
    hazard = {granule.write.warp == kAtomic ? "read after atomic" : "read after write",
              granule.write.line};
  Touch& read = granule.read;
  const bool same_epoch = read.epoch == now.epoch;
  const bool other_warp = same_epoch && read.warp != now.warp;
  const bool other_lane =
      same_epoch && read.warp_barriers == now.warp_barriers && read.lane != now.lane;
  read = now;
  if (other_warp) read.warp = kSeveral;
  if (other_lane) read.lane = kSeveral;
}

void note_write(ShadowGranule& granule, const Touch& now, bool atomic, Hazard& hazard) {
  Touch& write = granule.write;
  const bool same_epoch = write.epoch == now.epoch;
  if (unordered_lanes(write, now)) hazard = {"write after another lane's write", write.line};
  if (unordered_lanes(granule.read, now))
    hazard = {"write after another lane's read", granule.read.line};
  if (granule.copies) hazard = {"write to where an asynchronous copy is on its way", write.line};
  const bool after_atomic = write.warp == kAtomic && (atomic || own_atomics(granule, now));
  if (same_epoch && write.warp != now.warp && !after_atomic)
    hazard = {"write after write", write.line};
  else if (granule.read.epoch == now.epoch && granule.read.warp != now.warp)
    hazard = {"write after read", granule.read.line};
  const bool others =
      atomic && same_epoch && write.warp == kAtomic && granule.atomic_warp != now.warp;
  granule.atomic_warp = others ? kSeveral : now.warp;
  write = now;
  if (atomic) write.warp = kAtomic;
}

// Calls a function for the granules of an access. Accesses up to now were multiples of a granule;
// one that is not makes granules smaller, each with what was known of the whole.
template <typename F>
void for_each_granule(Block& block, uint32_t offset, uint32_t bytes, F&& function) {
  const uint32_t old = block.shadow_granule;
  const uint32_t fitting = 1u << std::countr_zero(offset | bytes | old);
  if (block.shadow.empty()) {
    block.shadow_granule = fitting;
    block.shadow.resize((block.shared_bytes + fitting - 1) / fitting);
  } else if (fitting < old) {
    std::vector<ShadowGranule> finer((block.shared_bytes + fitting - 1) / fitting);
    for (size_t k = 0; k < finer.size(); k++) finer[k] = block.shadow[k / (old / fitting)];
    block.shadow = std::move(finer);
    block.shadow_granule = fitting;
  }
  const size_t end = (offset + bytes) / fitting;
  for (size_t k = offset / fitting; k < end; k++) function(block.shadow[k]);
}

}  // namespace

void Warp::note_copy(uint32_t offset, uint32_t bytes, int change) {
  if (!launch->check_races || block->shadow.empty()) return;
  for_each_granule(*block, offset, bytes, [&](ShadowGranule& granule) {
    if (change > 0 || granule.copies > 0)
      granule.copies = static_cast<uint16_t>(granule.copies + change);
  });
}

void Warp::check_race(const Instruction& instruction, int lane, Block& owner, uint32_t offset,
                      uint32_t bytes, Access access) {
  if (owner.complex_sync) return;
  if (&instruction != checked || checked_lanes >> lane & 1) {
    checked = &instruction;
    checked_lanes = 0;
    checked_serial++;
  }
  checked_lanes |= 1u << lane;
  const auto line = static_cast<uint32_t>(instruction.source->line);
  const Touch now{.epoch = owner.epoch,
                  .warp = static_cast<int16_t>(id),
                  .lane = static_cast<int8_t>(lane),
                  .warp_barriers = warp_barriers,
                  .serial = checked_serial,
                  .line = line};
  Hazard hazard;
  for_each_granule(owner, offset, bytes, [&](ShadowGranule& granule) {
    if (access == Access::kRead)
      note_read(granule, now, hazard);
    else
      note_write(granule, now, access == Access::kAtomic, hazard);
  });
  if (!hazard.kind) return;
  Statistics& statistics = launch->statistics;
  statistics.races++;
  const bool keep = statistics.race_examples.size() < kMaxExamples;
  if (!keep && !launch->options.stop_at_race) return;
  const std::string message =
      concat(hazard.kind, " without a barrier between: PTX line ", hazard.other_line, " and line ",
             line, " (", instruction.source->text, ")");
  std::vector<std::string>& examples = statistics.race_examples;
  if (std::find(examples.begin(), examples.end(), message) == examples.end() && keep)
    examples.push_back(message);
  if (launch->options.stop_at_race)
    fail(instruction, -1, concat("shared-memory hazard: ", message, ", shared offset ", offset));
}

}  // namespace mergeme::ptx
