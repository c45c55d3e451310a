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

// Whether another lane of the same warp touched the byte, with no barrier since.
bool unordered_lanes(const Touch& before, const Touch& now) {
  return before.epoch == now.epoch && before.warp == now.warp && before.lane != now.lane &&
         before.warp_barriers == now.warp_barriers && before.serial != now.serial;
}
// Whether the byte was last written by atomics of this warp alone, before its last warp barrier.
bool own_atomics(const ShadowByte& byte, const Touch& now) {
  return byte.write.warp == kAtomic && byte.atomic_warp == now.warp &&
         byte.write.warp_barriers != now.warp_barriers;
}

void note_read(ShadowByte& byte, const Touch& now, Hazard& hazard) {
  if (unordered_lanes(byte.write, now))
    hazard = {"read after another lane's write", byte.write.line};
  if (byte.write.epoch == now.epoch && byte.write.warp != now.warp && !own_atomics(byte, now))
    hazard = {byte.write.warp == kAtomic ? "read after atomic" : "read after write",
              byte.write.line};
  Touch& read = byte.read;
  const bool same_epoch = read.epoch == now.epoch;
  const bool other_warp = same_epoch && read.warp != now.warp;
  const bool other_lane =
      same_epoch && read.warp_barriers == now.warp_barriers && read.lane != now.lane;
  read = now;
  if (other_warp) read.warp = kSeveral;
  if (other_lane) read.lane = kSeveral;
}

void note_write(ShadowByte& byte, const Touch& now, bool atomic, Hazard& hazard) {
  Touch& write = byte.write;
  const bool same_epoch = write.epoch == now.epoch;
  if (unordered_lanes(write, now)) hazard = {"write after another lane's write", write.line};
  if (unordered_lanes(byte.read, now)) hazard = {"write after another lane's read", byte.read.line};
  if (byte.copies) hazard = {"write to where an asynchronous copy is on its way", write.line};
  const bool after_atomic = write.warp == kAtomic && (atomic || own_atomics(byte, now));
  if (same_epoch && write.warp != now.warp && !after_atomic)
    hazard = {"write after write", write.line};
  else if (byte.read.epoch == now.epoch && byte.read.warp != now.warp)
    hazard = {"write after read", byte.read.line};
  const bool others = atomic && same_epoch && write.warp == kAtomic && byte.atomic_warp != now.warp;
  byte.atomic_warp = others ? kSeveral : now.warp;
  write = now;
  if (atomic) write.warp = kAtomic;
}

}  // namespace

void Warp::note_copy(uint32_t offset, uint32_t bytes, int change) {
  if (!launch->check_races || block->shadow.empty()) return;
  for (uint32_t at = offset; at < offset + bytes; at++) {
    uint16_t& copies = block->shadow[at].copies;
    if (change > 0 || copies > 0) copies = static_cast<uint16_t>(copies + change);
  }
}

void Warp::check_race(const Instruction& instruction, int lane, Block& owner, uint32_t offset,
                      uint32_t bytes, Access access) {
  if (owner.complex_sync) return;
  if (owner.shadow.empty()) owner.shadow.resize(owner.shared_bytes);
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
  for (uint32_t at = offset; at < offset + bytes; at++) {
    ShadowByte& byte = owner.shadow[at];
    if (access == Access::kRead)
      note_read(byte, now, hazard);
    else
      note_write(byte, now, access == Access::kAtomic, hazard);
  }
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
