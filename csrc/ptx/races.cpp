// Hazards in shared memory: two warps touch a byte, one of them writes, and no barrier of the whole
// block lies between.
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr int16_t kAtomicWriter = -2;
constexpr int16_t kSeveralReaders = -1;
constexpr size_t kMaxExamples = 20;

struct Hazard {
  const char* kind = nullptr;
  uint32_t other_line = 0;
};

void note_read(ShadowByte& byte, uint32_t epoch, int16_t warp, uint32_t line, Hazard& hazard) {
  if (byte.write_epoch == epoch && byte.writer == kAtomicWriter)
    hazard = {"read after atomic", byte.write_line};
  else if (byte.write_epoch == epoch && byte.writer != warp)
    hazard = {"read after write", byte.write_line};
  if (byte.read_epoch != epoch) {
    byte.read_epoch = epoch;
    byte.reader = warp;
  } else if (byte.reader != warp) {
    byte.reader = kSeveralReaders;
  }
  byte.read_line = line;
}

void note_write(ShadowByte& byte, uint32_t epoch, int16_t warp, uint32_t line, bool atomic,
                Hazard& hazard) {
  const bool both_atomic = atomic && byte.writer == kAtomicWriter;
  if (byte.write_epoch == epoch && byte.writer != warp && !both_atomic)
    hazard = {"write after write", byte.write_line};
  else if (byte.read_epoch == epoch && byte.reader != warp)
    hazard = {"write after read", byte.read_line};
  byte.write_epoch = epoch;
  byte.writer = atomic ? kAtomicWriter : warp;
  byte.write_line = line;
}

}  // namespace

void Warp::check_race(const Instruction& instruction, Block& owner, uint32_t offset, uint32_t bytes,
                      Access access) {
  if (owner.complex_sync) return;
  if (owner.shadow.empty()) owner.shadow.resize(owner.shared_bytes);
  const auto line = static_cast<uint32_t>(instruction.source->line);
  const auto self = static_cast<int16_t>(id);
  Hazard hazard;
  for (uint32_t at = offset; at < offset + bytes; at++) {
    ShadowByte& byte = owner.shadow[at];
    if (access == Access::kRead)
      note_read(byte, owner.epoch, self, line, hazard);
    else
      note_write(byte, owner.epoch, self, line, access == Access::kAtomic, hazard);
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
