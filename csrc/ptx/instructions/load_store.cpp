// ld and st, of every width and space.
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

constexpr int kMaxElements = 8;

template <typename T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// An element as its register holds it, zero above its own bits.
uint64_t load_unsigned(const uint8_t* from, int bytes) {
  switch (bytes) {
    case 1:
      return *from;
    case 2:
      return read<uint16_t>(from);
    case 4:
      return read<uint32_t>(from);
    default:
      return read<uint64_t>(from);
  }
}

// Signed types extend to the register's width.
uint64_t load_signed(const uint8_t* from, int bytes, int register_bytes) {
  const int unused_bits = 64 - 8 * bytes;
  const auto high = static_cast<int64_t>(load_unsigned(from, bytes) << unused_bits);
  return low_bytes(static_cast<uint64_t>(high >> unused_bits), register_bytes);
}

uint64_t load_element(const uint8_t* from, int bytes, bool is_signed, int register_bytes) {
  return is_signed ? load_signed(from, bytes, register_bytes) : load_unsigned(from, bytes);
}

void store_element(uint8_t* to, uint64_t value, int bytes) {
  switch (bytes) {
    case 1:
      *to = static_cast<uint8_t>(value);
      break;
    case 2:
      std::memcpy(to, &value, 2);
      break;
    case 4:
      std::memcpy(to, &value, 4);
      break;
    default:
      std::memcpy(to, &value, 8);
  }
}

int64_t offset_of(const Warp& warp, const Operand& address) {
  return address.offset + (address.in_frame ? static_cast<int64_t>(warp.frame_local) : 0);
}

bool is_counted(const Warp& warp, Space space) {
  return warp.launch->options.statistics && space != Space::kParam && space != Space::kLocal &&
         space != Space::kConst;
}

// A kernel's parameter at a fixed place is the same for every lane.
void load_parameter(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const Operand& address = instruction.operands[1];
  const int bytes = instruction.element_size;
  const uint8_t* from =
      warp.resolve(instruction, 0, row(warp, address)[0] + offset_of(warp, address),
                   instruction.vector_size * bytes, Space::kParam, Access::kRead);
  for (int k = 0; k < instruction.vector_size; k++) {
    const Operand& to = element(instruction, instruction.operands[0], k);
    const uint64_t value =
        load_element(from + k * bytes, bytes, is_signed(instruction.type), to.width);
    uint64_t* d = result_row(warp, to);
    for_each_lane(mask, [=](int lane) { d[lane] = value; });
  }
}

void load(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const Operand& address = instruction.operands[1];
  const Space space = instruction.space;
  if (space == Space::kParam && address.bank == Bank::kImmediates && warp.frames.size() == 1 &&
      !instruction.call_param) {
    load_parameter(warp, instruction, mask);
    return;
  }
  const uint64_t* a = row(warp, address);
  const int64_t offset = offset_of(warp, address);
  const int count = instruction.vector_size;
  const int bytes = instruction.element_size;
  const bool extends = is_signed(instruction.type);
  uint64_t addresses[kWarpSize];
  bool shared = false;
  // The address may lie in a register that is loaded: no result is written before all are read.
  uint64_t values[kMaxElements][kWarpSize];
  int widths[kMaxElements];
  for (int k = 0; k < count; k++)
    widths[k] = element(instruction, instruction.operands[0], k).width;
  for_each_lane(mask, [&](int lane) {
    addresses[lane] = a[lane] + offset;
    const uint8_t* from =
        warp.resolve(instruction, lane, addresses[lane], count * bytes, space, Access::kRead);
    shared |= warp.touched_shared;
    for (int k = 0; k < count; k++)
      values[k][lane] = load_element(from + k * bytes, bytes, extends, widths[k]);
  });
  for (int k = 0; k < count; k++) {
    uint64_t* d = result_row(warp, element(instruction, instruction.operands[0], k));
    for_each_lane(mask, [&](int lane) { d[lane] = values[k][lane]; });
  }
  if (is_counted(warp, space)) warp.count_access(addresses, mask, count * bytes, shared, false);
}

void store(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const Operand& address = instruction.operands[0];
  const uint64_t* a = row(warp, address);
  const int64_t offset = offset_of(warp, address);
  const int count = instruction.vector_size;
  const int bytes = instruction.element_size;
  const uint64_t* sources[kMaxElements];
  for (int k = 0; k < count; k++)
    sources[k] = row(warp, element(instruction, instruction.operands[1], k));
  uint64_t addresses[kWarpSize];
  bool shared = false;
  const auto store_lane = [&](int lane) {
    addresses[lane] = a[lane] + offset;
    uint8_t* to = warp.resolve(instruction, lane, addresses[lane], count * bytes, instruction.space,
                               Access::kWrite);
    for (int k = 0; k < count; k++) store_element(to + k * bytes, sources[k][lane], bytes);
    if (!warp.touched_shared) return;
    shared = true;
    note_generic_write(warp, lane, to, count * bytes);
  };
  if (warp.launch->reverse_lanes)
    for_each_lane_backwards(mask, store_lane);
  else
    for_each_lane(mask, store_lane);
  if (is_counted(warp, instruction.space))
    warp.count_access(addresses, mask, count * bytes, shared, true);
}

// A .b128 register is two rows: a vector of twice as many elements of .b64.
void split_128(Instruction& i, Operand& data) {
  std::vector<Operand> halves;
  const int count = data.kind == OperandKind::kVector ? data.count : 1;
  for (int k = 0; k < count; k++) {
    Operand half = element(i, data, k);
    half.width = 8;
    halves.push_back(half);
    if (half.kind != OperandKind::kSink) half.index++;
    halves.push_back(half);
  }
  data.kind = OperandKind::kVector;
  data.first = static_cast<uint16_t>(i.elements.size());
  data.count = static_cast<uint16_t>(halves.size());
  i.elements.insert(i.elements.end(), halves.begin(), halves.end());
  i.type = Type::kB64;
}

}  // namespace

bool decode_load_store(const ParsedInstruction& parsed, Instruction& i) {
  const bool stores = parsed.opcode == "st";
  if (!stores && parsed.opcode != "ld" && parsed.opcode != "ldu") return false;
  if (parsed.has("async") || parsed.has("bulk") || parsed.operands.size() < 2) return false;
  i.space = space_of(parsed);
  Operand& data = i.operands[stores ? 1 : 0];
  if (i.type == Type::kB128) split_128(i, data);
  const int count = data.kind == OperandKind::kVector ? data.count : 1;
  if (count > kMaxElements || size_of(i.type) == 0) return false;
  i.vector_size = static_cast<uint8_t>(count);
  i.element_size = static_cast<uint8_t>(size_of(i.type));
  if (i.space == Space::kParam) {
    const ParsedOperand& base = parsed.operands[stores ? 0 : 1].elements[0];
    i.call_param = base.kind == OperandKind::kSymbol && !base.symbol->is_extern;
  }
  i.execute = stores ? store : load;
  return true;
}

}  // namespace mergeme::ptx
