// cvt between integers and floating-point formats, and its packed forms.
#include <cmath>
#include <limits>

#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

uint64_t ones(int bits) { return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

// A value of an integer type as a register of `register_bytes` holds it: signed types extend.
uint64_t extended(uint64_t value, Type type, int register_bytes) {
  const int bits = size_of(type) * 8;
  uint64_t result = value & ones(bits);
  if (is_signed(type) && (result >> (bits - 1)) & 1) result |= ~ones(bits);
  return low_bytes(result, register_bytes);
}

// x rounded to an integer as a modifier says, .rn and the like as .rni.
double rounded_to_integer(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::kRz:
    case Rounding::kRzi:
      return std::trunc(x);
    case Rounding::kRm:
    case Rounding::kRmi:
      return std::floor(x);
    case Rounding::kRp:
    case Rounding::kRpi:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

// What is out of range becomes the end of the range. A NaN becomes 0, but the highest bit alone
// where the source or the result has 64 bits.
uint64_t float_to_integer(double x, Type type, Rounding rounding, Type source_type) {
  const int bits = size_of(type) * 8;
  const uint64_t highest_bit = uint64_t{1} << (bits - 1);
  if (std::isnan(x)) return source_type == Type::kF64 || bits == 64 ? highest_bit : 0;
  x = rounded_to_integer(x, rounding);
  if (is_signed(type)) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (x < -limit) return highest_bit;
    if (x >= limit) return highest_bit - 1;
    return static_cast<uint64_t>(static_cast<int64_t>(x));
  }
  if (x <= 0) return 0;
  if (x >= std::ldexp(1.0, bits)) return ones(bits);
  return static_cast<uint64_t>(x);
}

// .sat between integers: `value` has been extended to 64 bits as its type asks.
uint64_t saturated_integer(uint64_t value, Type type, Type source_type) {
  const int bits = size_of(type) * 8;
  const uint64_t largest = is_signed(type) ? ones(bits) >> 1 : ones(bits);
  if (!is_signed(source_type) || static_cast<int64_t>(value) >= 0) return std::min(value, largest);
  if (!is_signed(type)) return 0;
  const int64_t lowest = -static_cast<int64_t>(largest) - 1;
  return static_cast<uint64_t>(std::max(static_cast<int64_t>(value), lowest));
}

// The processor rounds from integers as it is told; kept out of line, so that the conversion stays
// inside the scope.
template <typename T>
[[gnu::noinline]] T convert_integer(uint64_t value, bool is_negative_capable) {
  return is_negative_capable ? static_cast<T>(static_cast<int64_t>(value)) : static_cast<T>(value);
}

// An integer as a double from which a format of at most 24 bits is rounded as from the integer
// itself: what a double cannot hold is rounded to odd.
double integer_for_rounding(uint64_t value, bool signed_value) {
  const bool negative = signed_value && static_cast<int64_t>(value) < 0;
  const uint64_t magnitude = negative ? uint64_t{0} - value : value;
  double result = static_cast<double>(magnitude);
  if (magnitude >= uint64_t{1} << 53) {
    const uint64_t rest = magnitude & 4095;
    result = static_cast<double>((magnitude >> 12) | (rest ? 1 : 0)) * 4096.0;
  }
  return negative ? -result : result;
}

uint64_t integer_to_float(uint64_t value, const Instruction& instruction) {
  const bool signed_value = is_signed(instruction.source_type);
  const Type type = instruction.type;
  if (type == Type::kF32) {
    const RoundingScope scope(instruction.rounding);
    return to_register(convert_integer<float>(value, signed_value));
  }
  if (type == Type::kF64) {
    const RoundingScope scope(instruction.rounding);
    return to_register(convert_integer<double>(value, signed_value));
  }
  return encode_float(integer_for_rounding(value, signed_value), type, instruction.rounding, false);
}

uint64_t float_to_float(uint64_t bits, const Instruction& instruction) {
  const Type type = instruction.type;
  const Type source_type = instruction.source_type;
  const Rounding rounding = instruction.rounding;
  double x = decode_float(bits, source_type);
  if (instruction.ftz && source_type == Type::kF32) x = flush_denormal(static_cast<float>(x));
  if (rounding >= Rounding::kRni) x = rounded_to_integer(x, rounding);
  if (instruction.sat) x = saturate(x);
  if (instruction.relu && x <= 0) x = 0;  // -0 too
  if (type == Type::kF64) return canonical(x);
  if (type == Type::kF32 && source_type != Type::kF64) {
    const float result = static_cast<float>(x);  // exact
    return canonical(instruction.ftz ? flush_denormal(result) : result);
  }
  const Rounding last = rounding >= Rounding::kRni ? Rounding::kRn : rounding;
  uint64_t result = encode_float(x, type, last, instruction.satfinite);
  if (type == Type::kF32 && instruction.ftz)
    result = to_register(flush_denormal(from_register<float>(result)));
  return result;
}

uint64_t convert(uint64_t bits, const Instruction& instruction) {
  const Type type = instruction.type;
  const Type source_type = instruction.source_type;
  const int register_bytes = instruction.operands[0].width;
  if (is_floating(source_type)) {
    if (is_floating(type)) return float_to_float(bits, instruction);
    double x = decode_float(bits, source_type);
    if (instruction.ftz && source_type == Type::kF32) x = flush_denormal(static_cast<float>(x));
    const uint64_t integer = float_to_integer(x, type, instruction.rounding, source_type);
    return extended(integer, type, register_bytes);
  }
  const uint64_t value = extended(bits, source_type, 8);
  if (!is_floating(type)) {
    return extended(instruction.sat ? saturated_integer(value, type, source_type) : value, type,
                    register_bytes);
  }
  const uint64_t result = integer_to_float(value, instruction);
  if (!instruction.sat) return result;
  return encode_float(saturate(decode_float(result, type)), type, Rounding::kRn, false);
}

void cvt(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [&](int lane) { d[lane] = convert(a[lane], instruction); });
}

// ---- the conversions that kernels are full of, without the way through double

void half_to_f32(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(
      mask, [=](int lane) { d[lane] = canonical(half_to_float(static_cast<uint16_t>(a[lane]))); });
}
void bfloat16_to_f32(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = canonical(bfloat16_to_float(static_cast<uint16_t>(a[lane])));
  });
}
void low_32_bits(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [=](int lane) { d[lane] = static_cast<uint32_t>(a[lane]); });
}
void s32_to_s64(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = static_cast<uint64_t>(int64_t{from_register<int32_t>(a[lane])});
  });
}

Handler quick_handler(const Instruction& i) {
  if (i.sat || i.relu) return nullptr;
  if (i.type == Type::kF32 && i.source_type == Type::kF16) return half_to_f32;
  if (i.type == Type::kF32 && i.source_type == Type::kBF16) return bfloat16_to_f32;
  if (i.type == Type::kU64 && i.source_type == Type::kU32) return low_32_bits;
  if (i.type == Type::kS64 && i.source_type == Type::kS32) return s32_to_s64;
  const bool to_32 = i.type == Type::kU32 || i.type == Type::kS32;
  const bool from_64 = i.source_type == Type::kU64 || i.source_type == Type::kS64;
  return to_32 && from_64 && i.operands[0].width == 4 ? low_32_bits : nullptr;
}

// ---- packed forms

bool is_packed(Type type) {
  return type == Type::kF16x2 || type == Type::kBF16x2 || type == Type::kE4M3x2 ||
         type == Type::kE5M2x2;
}
Type element_type(Type packed) {
  switch (packed) {
    case Type::kF16x2:
      return Type::kF16;
    case Type::kBF16x2:
      return Type::kBF16;
    case Type::kE4M3x2:
      return Type::kE4M3;
    default:
      return Type::kE5M2;
  }
}

uint64_t encode_element(double x, Type type, const Instruction& instruction) {
  if (instruction.relu && x <= 0) x = 0;
  if (instruction.rounding == Rounding::kRn && !instruction.satfinite) {
    if (type == Type::kF16) return float_to_half(static_cast<float>(x));
    if (type == Type::kBF16) return float_to_bfloat16(static_cast<float>(x));
  }
  return encode_float(x, type, instruction.rounding, instruction.satfinite);
}

// Two f32, the first to become the upper element.
void pack_floats(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const Type type = element_type(instruction.type);
  const int bits = size_of(type) * 8;
  for_each_lane(mask, [&](int lane) {
    const uint64_t high = encode_element(from_register<float>(a[lane]), type, instruction);
    const uint64_t low = encode_element(from_register<float>(b[lane]), type, instruction);
    d[lane] = high << bits | low;
  });
}

void repack(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const Type type = element_type(instruction.type);
  const Type source_type = element_type(instruction.source_type);
  const int bits = size_of(type) * 8;
  const int source_bits = size_of(source_type) * 8;
  const auto element = [&](uint64_t packed) {
    const double x = decode_float(packed & ones(source_bits), source_type);
    return encode_element(x, type, instruction);
  };
  for_each_lane(mask, [&](int lane) {
    d[lane] = element(a[lane] >> source_bits) << bits | element(a[lane]);
  });
}

// cvt.pack.sat: a above b, saturated, and above them what is there of c.
void pack_integers(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = instruction.num_operands > 3 ? row(warp, instruction.operands[3]) : nullptr;
  const Type type = instruction.type;
  const int bits = size_of(type) * 8;
  const auto element = [=](uint64_t value) {
    const uint64_t wide = extended(value, Type::kS32, 8);
    return static_cast<uint32_t>(saturated_integer(wide, type, Type::kS32) & ones(bits));
  };
  for_each_lane(mask, [=](int lane) {
    uint32_t result = element(a[lane]) << bits | element(b[lane]);
    if (c) result |= static_cast<uint32_t>(c[lane]) << (2 * bits);
    d[lane] = result;
  });
}

bool is_convertible(Type type) {
  return (type >= Type::kB8 && type <= Type::kB64) || (type >= Type::kU8 && type <= Type::kS64) ||
         type == Type::kF16 || type == Type::kBF16 || type == Type::kF32 || type == Type::kF64 ||
         type == Type::kTF32;
}

bool decode_packed(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.has("rs")) return false;  // stochastic rounding
  if (i.type == Type::kE4M3x2 || i.type == Type::kE5M2x2) i.satfinite = true;
  if (i.source_type == Type::kF32) {
    if (parsed.operands.size() != 3) return false;
    i.execute = pack_floats;
    return true;
  }
  if (!is_packed(i.source_type)) return false;
  i.execute = repack;
  return true;
}

}  // namespace

bool decode_conversion(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode != "cvt") return false;
  const std::vector<Type> types = parsed.types();
  if (parsed.has("pack")) {
    if (types.empty() || size_of(types[0]) > 2) return false;
    i.type = types[0];
    i.execute = pack_integers;
    return true;
  }
  if (types.size() != 2) return false;
  i.type = types[0];
  i.source_type = types[1];
  i.satfinite = parsed.has("satfinite");
  if (parsed.has("rna")) i.rounding = Rounding::kRna;
  if (is_packed(i.type)) return decode_packed(parsed, i);
  if (!is_convertible(i.type) || !is_convertible(i.source_type)) return false;
  const Handler quick = quick_handler(i);
  i.execute = quick ? quick : cvt;
  return true;
}

}  // namespace mergeme::ptx
