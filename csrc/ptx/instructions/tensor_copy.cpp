// cp.async.bulk.tensor: boxes of tensors that a map describes, and changes to maps.
#include <iterator>

#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/bulk_copy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/instructions/reduction.h"
#include "csrc/ptx/messages.h"
#include "csrc/ptx/tensor_map.h"

namespace mergeme::ptx {
namespace {

constexpr uint32_t kMapBytes = 128;
constexpr uint32_t kMapAlignment = 64;
constexpr uint32_t kSharedAlignment = 128;
constexpr uint32_t kUnit = 16;  // what a swizzle moves as a whole

// The formats of CUtensorMapDataType.
constexpr Type kFormats[] = {Type::kU8,  Type::kU16,  Type::kU32, Type::kS32, Type::kU64,
                             Type::kS64, Type::kF16,  Type::kF32, Type::kF64, Type::kBF16,
                             Type::kF32, Type::kTF32, Type::kTF32};

using Coordinates = std::array<int32_t, TensorMap::kMaxRank>;

// Where a byte of shared memory really lies: within rows of 128 bytes, units of 16 are exchanged by
// the number of the row among 8 (of 128-byte swizzling), 4 or 2.
uint32_t swizzled(uint32_t offset, int swizzle) {
  if (swizzle == 0) return offset;
  const uint32_t bits = ((1u << swizzle) - 1) << 4;
  return offset ^ ((offset >> 3) & bits);
}

// Elements of the box along a dimension.
uint32_t extent(const TensorMap& map, uint32_t k) {
  return (map.box[k] + map.element_strides[k] - 1u) / map.element_strides[k];
}
uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t k = 0; k < map.rank; k++) bytes *= extent(map, k);
  return bytes;
}

// The rules of cuTensorMapEncodeTiled; empty if all are kept.
std::string broken_rule(const TensorMap& map) {
  constexpr uint64_t kMaxDim = uint64_t{1} << 32;
  constexpr uint64_t kMaxStride = uint64_t{1} << 40;
  if (map.rank < 1 || map.rank > TensorMap::kMaxRank) return concat("rank ", map.rank);
  if (map.address % 16) return "global address not 16-byte aligned";
  if (map.interleave) return "interleaved layout";
  if (map.swizzle > 3) return "unknown swizzle";
  if (map.format >= std::size(kFormats)) return "unknown element type";
  for (uint32_t k = 0; k < map.rank; k++) {
    if (map.dims[k] == 0 || map.dims[k] > kMaxDim)
      return concat("dimension ", k, " of ", map.dims[k], " elements");
    if (map.box[k] == 0 || map.box[k] > 256)
      return concat("box of ", map.box[k], " elements along dimension ", k, ", not 1 to 256");
    if (map.element_strides[k] == 0 || map.element_strides[k] > 8)
      return concat("element stride ", int{map.element_strides[k]}, ", not 1 to 8");
    if (k + 1 < map.rank && (map.strides[k] % 16 || map.strides[k] >= kMaxStride))
      return concat("stride of ", map.strides[k], " bytes, not a multiple of 16 under 2^40");
  }
  const uint32_t row_bytes = map.box[0] * uint32_t{map.element_bytes};
  if (row_bytes % 16) return concat("box rows of ", row_bytes, " bytes, not a multiple of 16");
  if (map.swizzle && row_bytes > 16u << map.swizzle)
    return concat("box rows of ", row_bytes, " bytes, more than the swizzle's ",
                  16u << map.swizzle);
  return {};
}

// A map lies in global memory, in a kernel's parameters or, while it is made, in shared memory.
uint8_t* resolve_map(Warp& warp, const Instruction& instruction, int lane, uint64_t address,
                     Space space, Access access) {
  const uint64_t in_parameters = address - reinterpret_cast<uint64_t>(warp.launch->parameters);
  if (space == Space::kGeneric && in_parameters + kMapBytes <= warp.launch->parameter_bytes &&
      access == Access::kRead)
    return reinterpret_cast<uint8_t*>(address);
  uint8_t* first = warp.resolve(instruction, lane, address, kMapBytes / 2, space, access);
  warp.resolve(instruction, lane, address + kMapBytes / 2, kMapBytes / 2, space, access);
  return first;
}

TensorMap load_map(Warp& warp, const Instruction& instruction, int lane, uint64_t address) {
  if (address % kMapAlignment) warp.fail(instruction, lane, "tensor map is not 64-byte aligned");
  TensorMap map;
  std::memcpy(&map, resolve_map(warp, instruction, lane, address, Space::kGeneric, Access::kRead),
              sizeof map);
  if (map.magic != TensorMap::kMagic)
    warp.fail(instruction, lane, "not a tensor map made for the interpreter");
  if (const std::string rule = broken_rule(map); !rule.empty())
    warp.fail(instruction, lane, "bad tensor map: " + rule);
  if (map.rank != static_cast<uint32_t>(instruction.immediate))
    warp.fail(instruction, lane,
              concat("tensor map of rank ", map.rank, " in an instruction of rank ",
                     instruction.immediate));
  return map;
}

// Calls run(offset in the box, address in the tensor or 0 for what lies outside, elements) for
// every run of elements that is one piece in both. Addresses are formed without a bounds check.
template <typename Run>
void for_each_run(const TensorMap& map, const Coordinates& at, Run run) {
  const uint32_t columns = extent(map, 0);
  const uint32_t row_bytes = columns * map.element_bytes;
  uint32_t rows = 1;
  for (uint32_t k = 1; k < map.rank; k++) rows *= extent(map, k);
  for (uint32_t r = 0; r < rows; r++) {
    uint32_t rest = r;
    bool inside = true;
    uint64_t address = map.address;
    for (uint32_t k = 1; k < map.rank; k++) {
      const int64_t index = at[k] + int64_t{rest % extent(map, k)} * map.element_strides[k];
      rest /= extent(map, k);
      inside &= index >= 0 && index < static_cast<int64_t>(map.dims[k]);
      address += static_cast<uint64_t>(index) * map.strides[k - 1];
    }
    const uint32_t offset = r * row_bytes;
    if (!inside) {
      run(offset, uint64_t{0}, columns);
      continue;
    }
    const auto is_inside = [&](int64_t index) {
      return index >= 0 && index < static_cast<int64_t>(map.dims[0]);
    };
    for (uint32_t column = 0; column < columns;) {
      const int64_t index = at[0] + int64_t{column} * map.element_strides[0];
      uint32_t length = 1;
      if (map.element_strides[0] == 1)
        while (column + length < columns && is_inside(index + length) == is_inside(index)) length++;
      run(offset + column * map.element_bytes,
          is_inside(index) ? address + static_cast<uint64_t>(index) * map.element_bytes : 0,
          length);
      column += length;
    }
  }
}

// Whatever of the box lies inside the tensor must lie in buffers.
void check_box(Warp& warp, const Instruction& instruction, int lane, const TensorMap& map,
               const Coordinates& at, Access access) {
  for_each_run(map, at, [&](uint32_t, uint64_t address, uint32_t elements) {
    if (address == 0) return;
    const uint64_t end = address + uint64_t{elements} * map.element_bytes;
    const MemoryRange& last = warp.launch->ranges[warp.last_range];
    const bool known = address >= last.begin && end <= last.end;
    if (known && (access == Access::kRead || !last.read_only)) return;
    for (; address < end; address += map.element_bytes)
      warp.resolve_global(instruction, lane, address, map.element_bytes, access);
  });
}

// An element outside the tensor: zero, or where the map asks for it a NaN.
uint64_t fill_element(const TensorMap& map) {
  if (!map.fill) return 0;
  switch (kFormats[map.format]) {
    case Type::kF16:
      return 0x7e00;
    case Type::kBF16:
      return 0x7fc0;
    case Type::kF64:
      return kNanF64;
    default:
      return 0x7fc00000;
  }
}

std::vector<uint8_t> read_box(const TensorMap& map, const Coordinates& at) {
  std::vector<uint8_t> box(box_bytes(map));
  const uint64_t fill = fill_element(map);
  for_each_run(map, at, [&](uint32_t offset, uint64_t address, uint32_t elements) {
    if (address) {
      std::memcpy(&box[offset], reinterpret_cast<const void*>(address),
                  elements * map.element_bytes);
      return;
    }
    for (uint32_t k = 0; k < elements; k++)
      std::memcpy(&box[offset + k * map.element_bytes], &fill, map.element_bytes);
  });
  return box;
}

// Calls move(offset in shared memory, offset in the box, bytes) for every unit of the box.
template <typename Move>
void for_each_unit(const TensorMap& map, uint32_t first, uint32_t bytes, Move move) {
  for (uint32_t at = 0; at < bytes; at += kUnit)
    move(swizzled(first + at, map.swizzle), at, std::min(kUnit, bytes - at));
}

struct Copy {
  TensorMap map;
  Coordinates at;
  Block* block;
  uint32_t offset;
  uint32_t bytes;
};

// What loads and stores have in common. `tensor` is the operand [map, {coordinates}].
Copy decode_copy(Warp& warp, const Instruction& instruction, int lane, int tensor, int shared,
                 Access access_to_tensor) {
  const Operand& operand = instruction.operands[tensor];
  Copy copy{};
  copy.map = load_map(warp, instruction, lane, address_of(warp, instruction, tensor, lane));
  if (operand.count < copy.map.rank)
    warp.fail(instruction, lane, "fewer coordinates than the tensor has dimensions");
  for (uint32_t k = 0; k < copy.map.rank; k++)
    copy.at[k] = static_cast<int32_t>(row(warp, instruction.elements[operand.first + k])[lane]);
  copy.bytes = box_bytes(copy.map);

  constexpr uint64_t kOffsetMask = 0xffffff;
  const uint64_t address = address_of(warp, instruction, shared, lane);
  copy.block = warp.addressed_block(address);
  const uint64_t offset = (address & kOffsetMask) - kSharedBase;
  if (!copy.block || offset + copy.bytes > copy.block->shared_bytes)
    warp.fail(instruction, lane, "tensor copy outside shared memory");
  if (offset % kSharedAlignment)
    warp.fail(instruction, lane,
              concat("tensor copy: shared address not ", kSharedAlignment, "-byte aligned"));
  copy.offset = static_cast<uint32_t>(offset);
  check_box(warp, instruction, lane, copy.map, copy.at, access_to_tensor);
  return copy;
}

// Operands: [shared], [map, {coordinates}], [mbarrier], multicast mask.
void load_lane(Warp& warp, const Instruction& instruction, int lane) {
  const Copy copy = decode_copy(warp, instruction, lane, 1, 0, Access::kRead);
  for (Block* target : load_targets(warp, instruction, lane, copy.block, 3)) {
    for_each_unit(copy.map, copy.offset, copy.bytes, [&](uint32_t to, uint32_t, uint32_t bytes) {
      poison(target->shared + to, bytes);
    });
    begin_load(warp, instruction, lane, 2, *target, copy.bytes, [=] {
      const std::vector<uint8_t> box = read_box(copy.map, copy.at);
      note_async_write(*target, copy.offset, copy.bytes);
      for_each_unit(copy.map, copy.offset, copy.bytes,
                    [&](uint32_t to, uint32_t from, uint32_t bytes) {
                      std::memcpy(target->shared + to, &box[from], bytes);
                    });
    });
  }
}

// Operands: [map, {coordinates}], [shared].
void store_lane(Warp& warp, const Instruction& instruction, int lane) {
  const Copy copy = decode_copy(warp, instruction, lane, 0, 1, Access::kWrite);
  check_async_read(warp, instruction, lane, *copy.block, copy.offset, copy.bytes);
  const auto box = std::make_shared<std::vector<uint8_t>>(copy.bytes);
  const bool reduces = instruction.flag;
  const Reduction reduction = instruction.reduction;
  begin_store(
      warp, lane, copy.bytes,
      [=] {
        for_each_unit(copy.map, copy.offset, copy.bytes,
                      [&](uint32_t from, uint32_t to, uint32_t bytes) {
                        std::memcpy(&(*box)[to], copy.block->shared + from, bytes);
                      });
      },
      [=] {
        const Type type = kFormats[copy.map.format];
        for_each_run(copy.map, copy.at, [&](uint32_t offset, uint64_t address, uint32_t elements) {
          if (address == 0) return;
          auto* to = reinterpret_cast<uint8_t*>(address);
          const uint8_t* from = &(*box)[offset];
          const uint32_t bytes = elements * copy.map.element_bytes;
          if (!reduces) {
            std::memcpy(to, from, bytes);
            return;
          }
          for (uint32_t k = 0; k < bytes; k += copy.map.element_bytes)
            reduce_in_place(reduction, type, to + k, from + k);
        });
      });
}

void load(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { load_lane(warp, instruction, lane); });
}
void store(Warp& warp, const Instruction& instruction, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { store_lane(warp, instruction, lane); });
}

// ---- tensormap.replace

enum class Field : uint8_t {
  kGlobalAddress,
  kRank,
  kBoxDim,
  kGlobalDim,
  kGlobalStride,
  kElementStride,
  kElementType,
  kInterleave,
  kSwizzle,
  kFill
};
constexpr std::string_view kFields[] = {
    "global_address", "rank",     "box_dim",           "global_dim",   "global_stride",
    "element_stride", "elemtype", "interleave_layout", "swizzle_mode", "fill_mode"};

void replace_field(TensorMap& map, Field field, uint32_t ordinal, uint64_t value) {
  switch (field) {
    case Field::kGlobalAddress:
      map.address = value;
      break;
    case Field::kRank:
      map.rank = static_cast<uint32_t>(value) + 1;
      break;
    case Field::kBoxDim:
      map.box[ordinal] = static_cast<uint16_t>(value);
      break;
    case Field::kGlobalDim:
      map.dims[ordinal] = static_cast<uint32_t>(value);
      break;
    case Field::kGlobalStride:
      map.strides[ordinal] = value;
      break;
    case Field::kElementStride:
      map.element_strides[ordinal] = static_cast<uint8_t>(value);
      break;
    case Field::kElementType:
      map.format = static_cast<uint32_t>(value);
      break;
    case Field::kInterleave:
      map.interleave = static_cast<uint8_t>(value);
      break;
    case Field::kSwizzle:
      map.swizzle = static_cast<uint8_t>(value);
      break;
    case Field::kFill:
      map.fill = static_cast<uint8_t>(value);
      break;
  }
}

// Operands: [map], (ordinal of the dimension,) new value.
void replace(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const int value = instruction.num_operands - 1;
  for_each_lane(mask, [&](int lane) {
    uint8_t* memory = resolve_map(warp, instruction, lane, address_of(warp, instruction, 0, lane),
                                  instruction.space, Access::kWrite);
    TensorMap map;
    std::memcpy(&map, memory, sizeof map);
    if (map.magic != TensorMap::kMagic)
      warp.fail(instruction, lane, "not a tensor map made for the interpreter");
    const auto ordinal =
        value > 1 ? static_cast<uint32_t>(row(warp, instruction.operands[1])[lane]) : 0;
    if (ordinal >= TensorMap::kMaxRank)
      warp.fail(instruction, lane, concat("tensormap.replace of dimension ", ordinal));
    replace_field(map, static_cast<Field>(instruction.variant), ordinal,
                  row(warp, instruction.operands[value])[lane]);
    std::memcpy(memory, &map, sizeof map);
  });
}

// tensormap.cp_fenceproxy: the warp copies a map from shared to global memory.
void copy_map(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const int lane = std::countr_zero(mask);
  uint8_t* to = resolve_map(warp, instruction, lane, address_of(warp, instruction, 0, lane),
                            Space::kGlobal, Access::kWrite);
  const uint8_t* from = resolve_map(warp, instruction, lane, address_of(warp, instruction, 1, lane),
                                    Space::kShared, Access::kRead);
  std::memcpy(to, from, kMapBytes);
}

bool decode_map_change(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.has("cp_fenceproxy")) {
    i.control = Control::kWarpSync;
    i.aligned = true;
    i.execute = copy_map;
    return true;
  }
  const int field = modifier_among(parsed, kFields);
  if (field < 0) return false;
  i.variant = static_cast<uint8_t>(field);
  i.space = space_of(parsed) == Space::kShared ? Space::kShared : Space::kGeneric;
  i.execute = replace;
  return true;
}

}  // namespace

bool decode_tensor_copy(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode == "tensormap") return decode_map_change(parsed, i);
  if (parsed.opcode != "cp" || !parsed.has("bulk") || !parsed.has("tensor")) return false;
  if (parsed.has_prefix("im2col") || parsed.has_prefix("tile::")) return false;
  constexpr std::string_view kRanks[] = {"1d", "2d", "3d", "4d", "5d"};
  i.immediate = modifier_among(parsed, kRanks) + 1;
  if (i.immediate == 0) return false;
  i.flag = parsed.has("reduce");
  if (i.flag && !decode_reduction(parsed, i.reduction)) return false;
  i.multicast = parsed.has("multicast::cluster");
  // A store begins with the tensor, [map, {coordinates}].
  i.execute = parsed.operands[0].elements.size() > 1 ? store : load;
  return true;
}

}  // namespace mergeme::ptx
