// atom and red: one lane after the other, so that every operation is one step.
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/instructions/reduction.h"

namespace mergeme::ptx {
namespace {

constexpr int kMaxElements = 8;

void atomic(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const bool returns = instruction.flag;  // atom, not red
  const int first = returns ? 1 : 0;      // operand of the address
  const Operand& address = instruction.operands[first];
  const Operand& data = instruction.operands[first + 1];
  const bool swaps = instruction.reduction == Reduction::kCas;
  const uint64_t* a = row(warp, address);
  const uint64_t* other = swaps ? row(warp, instruction.operands[first + 2]) : a;
  const int count = instruction.vector_size;
  const int bytes = instruction.element_size;
  uint64_t addresses[kWarpSize];
  bool shared = false;
  const auto operate = [&](int lane) {
    addresses[lane] = a[lane] + address.offset;
    uint8_t* memory = warp.resolve(instruction, lane, addresses[lane], count * bytes,
                                   instruction.space, Access::kAtomic);
    if (warp.touched_shared) {
      shared = true;
      note_generic_write(warp, lane, memory, count * bytes);
    }
    // Results may overwrite operands, so all are computed first.
    uint64_t old[kMaxElements] = {};
    for (int k = 0; k < count; k++) {
      std::memcpy(&old[k], memory + k * bytes, bytes);
      const uint64_t operand = row(warp, element(instruction, data, k))[lane];
      const uint64_t value =
          reduce(instruction.reduction, instruction.type, old[k], operand, other[lane]);
      std::memcpy(memory + k * bytes, &value, bytes);
    }
    for (int k = 0; returns && k < count; k++) {
      const Operand& to = element(instruction, instruction.operands[0], k);
      if (to.kind != OperandKind::kSink) result_row(warp, to)[lane] = old[k];
    }
  };
  if (warp.launch->reverse_lanes)
    for_each_lane_backwards(mask, operate);
  else
    for_each_lane(mask, operate);
  if (warp.launch->options.statistics)
    warp.count_access(addresses, mask, count * bytes, shared, true);
}

// exch and cas of 128 bits, in two rows of registers.
void atomic_128(Warp& warp, const Instruction& instruction, uint32_t mask) {
  using Words = std::array<uint64_t, 2>;
  const auto words = [&](int operand, int lane) -> Words {
    const uint64_t* values = row(warp, instruction.operands[operand]);
    return {values[lane], values[lane + kWarpSize]};
  };
  const Operand& address = instruction.operands[1];
  const uint64_t* a = row(warp, address);
  uint64_t* d = result_row(warp, instruction.operands[0]);
  for_each_lane(mask, [&](int lane) {
    uint8_t* memory = warp.resolve(instruction, lane, a[lane] + address.offset, sizeof(Words),
                                   instruction.space, Access::kAtomic);
    Words old;
    std::memcpy(&old, memory, sizeof old);
    Words value = words(2, lane);
    if (instruction.reduction == Reduction::kCas) value = old == value ? words(3, lane) : old;
    std::memcpy(memory, &value, sizeof value);
    d[lane] = old[0];
    d[lane + kWarpSize] = old[1];
  });
}

}  // namespace

bool decode_atomic(const ParsedInstruction& parsed, Instruction& i) {
  if ((parsed.opcode != "atom" && parsed.opcode != "red") || parsed.has("async")) return false;
  if (!decode_reduction(parsed, i.reduction)) return false;
  i.flag = parsed.opcode == "atom";
  i.space = space_of(parsed);
  if (i.type == Type::kB128) {
    i.execute = i.flag ? atomic_128 : nullptr;
    return i.flag;
  }
  const Operand& data = i.operands[i.flag ? 2 : 1];
  i.vector_size = data.kind == OperandKind::kVector ? static_cast<uint8_t>(data.count) : 1;
  i.element_size = static_cast<uint8_t>(size_of(i.type));
  if (i.element_size == 0 || i.vector_size > kMaxElements) return false;
  i.execute = atomic;
  return true;
}

}  // namespace mergeme::ptx
