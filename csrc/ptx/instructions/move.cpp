// mov: registers, special registers, addresses, packing and unpacking of vectors.
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

void move(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const int bytes = instruction.element_size;
  if (instruction.operands[1].in_frame) {
    const uint64_t frame = warp.frame_local;
    for_each_lane(mask, [=](int lane) { d[lane] = a[lane] + frame; });
  } else if (bytes == 4) {
    for_each_lane(mask, [=](int lane) { d[lane] = static_cast<uint32_t>(a[lane]); });
  } else if (bytes == 8) {
    for_each_lane(mask, [=](int lane) { d[lane] = a[lane]; });
  } else {
    for_each_lane(mask, [=](int lane) { d[lane] = low_bytes(a[lane], bytes); });
  }
}

// A clock that goes on with the launch's instructions.
void move_clock(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t clock = warp.launch->statistics.warp_instructions * 4 + 1000;
  const auto which = static_cast<SpecialRegister>(instruction.immediate);
  const bool high =
      which == SpecialRegister::kClockHigh || which == SpecialRegister::kGlobalTimerHigh;
  const uint64_t value = low_bytes(high ? clock >> 32 : clock, instruction.operands[0].width);
  for_each_lane(mask, [=](int lane) { d[lane] = value; });
}

// A .b128 register is two rows, one after the other.
void move_128(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = a[lane];
    d[lane + kWarpSize] = a[lane + kWarpSize];
  });
}

constexpr int kMaxElements = 8;

// mov.b64 d, {a, b}: the first element is the lowest.
void pack(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const Operand& vector = instruction.operands[1];
  const uint64_t* sources[kMaxElements];
  for (int k = 0; k < vector.count; k++) sources[k] = row(warp, element(instruction, vector, k));
  const int count = vector.count;
  const int bytes = instruction.element_size;
  const bool two_rows = instruction.type == Type::kB128;
  for_each_lane(mask, [=](int lane) {
    uint64_t words[2] = {0, 0};
    for (int k = 0; k < count; k++) {
      const int bit = 8 * bytes * k;
      words[bit / 64] |= low_bytes(sources[k][lane], bytes) << (bit % 64);
    }
    d[lane] = words[0];
    if (two_rows) d[lane + kWarpSize] = words[1];
  });
}

void unpack(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint64_t* a = row(warp, instruction.operands[1]);
  const Operand& vector = instruction.operands[0];
  uint64_t* results[kMaxElements];
  for (int k = 0; k < vector.count; k++)
    results[k] = result_row(warp, element(instruction, vector, k));
  const int count = vector.count;
  const int bytes = instruction.element_size;
  const bool two_rows = instruction.type == Type::kB128;
  for_each_lane(mask, [=](int lane) {
    const uint64_t words[2] = {a[lane], two_rows ? a[lane + kWarpSize] : 0};
    for (int k = 0; k < count; k++) {
      const int bit = 8 * bytes * k;
      results[k][lane] = low_bytes(words[bit / 64] >> (bit % 64), bytes);
    }
  });
}

}  // namespace

bool decode_move(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode != "mov" || parsed.operands.size() != 2) return false;
  if (i.type == Type::kPred) return false;  // comparison.cpp
  const ParsedOperand& to = parsed.operands[0];
  const ParsedOperand& from = parsed.operands[1];
  const bool clock = from.kind == OperandKind::kSpecialRegister &&
                     from.index >= static_cast<int>(SpecialRegister::kClock);
  const ParsedOperand& vector = from.kind == OperandKind::kVector ? from : to;
  if (clock) {
    i.immediate = from.index;
    i.execute = move_clock;
  } else if (vector.kind == OperandKind::kVector) {
    if (vector.elements.size() > kMaxElements) return false;
    i.element_size =
        static_cast<uint8_t>(size_of(i.type) / static_cast<int>(vector.elements.size()));
    i.execute = &vector == &from ? pack : unpack;
  } else {
    i.element_size = static_cast<uint8_t>(size_of(i.type));
    i.execute = i.type == Type::kB128 ? move_128 : move;
  }
  return true;
}

}  // namespace mergeme::ptx
