// Integer arithmetic, logic, shifts and bit fields.
#include <limits>

#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

template <typename T>
constexpr int kBits = 8 * sizeof(T);

// ---- functions of one lane; sums and products wrap, so they are formed without a sign

struct Add {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
  }
};
struct Subtract {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
  }
};
struct MultiplyLow {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct MultiplyHigh {
  template <typename T>
  static T apply(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Wide>(a) * b) >> kBits<T>);
  }
};
template <typename Product>
struct MultiplyAdd {
  template <typename T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(Product::template apply<T>(a, b), c);
  }
};
// Division by zero gives all ones, and the remainder a: what GPUs do, though the manual leaves it
// open. The lowest number divided by -1 wraps.
struct Divide {
  template <typename T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return Subtract::apply<T>(0, a);
    return a / b;
  }
};
struct Remainder {
  template <typename T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return 0;
    return a % b;
  }
};
struct Minimum {
  template <typename T>
  static T apply(T a, T b) {
    return std::min(a, b);
  }
  template <typename T>
  static T apply(T a, T b, T c) {
    return std::min(std::min(a, b), c);
  }
};
struct Maximum {
  template <typename T>
  static T apply(T a, T b) {
    return std::max(a, b);
  }
  template <typename T>
  static T apply(T a, T b, T c) {
    return std::max(std::max(a, b), c);
  }
};
template <typename Function>
struct Relu {
  template <typename T>
  static T apply(T a, T b) {
    return std::max<T>(Function::template apply<T>(a, b), 0);
  }
};
template <int kSign>
struct AddSaturated {
  template <typename T>
  static T apply(T a, T b) {
    const int64_t sum = int64_t{a} + kSign * int64_t{b};
    return static_cast<T>(
        std::clamp<int64_t>(sum, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
  }
};
struct MultiplyHighAddSaturated {
  template <typename T>
  static T apply(T a, T b, T c) {
    return AddSaturated<1>::apply<T>(MultiplyHigh::apply<T>(a, b), c);
  }
};
struct Absolute {
  template <typename T>
  static T apply(T a) {
    return a < 0 ? Subtract::apply<T>(0, a) : a;
  }
};
struct Negate {
  template <typename T>
  static T apply(T a) {
    return Subtract::apply<T>(0, a);
  }
};
struct SumOfDifference {  // sad
  template <typename T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(c, a < b ? Subtract::apply<T>(b, a) : Subtract::apply<T>(a, b));
  }
};

struct And {
  template <typename T>
  static T apply(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <typename T>
  static T apply(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <typename T>
  static T apply(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <typename T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {  // cnot
  template <typename T>
  static T apply(T a) {
    return a == 0;
  }
};

// Amounts are of 32 bits, and what is beyond the width shifts everything out.
struct ShiftLeft {
  template <typename T>
  static T apply(T a, uint32_t amount) {
    return amount >= kBits<T> ? T{0} : static_cast<T>(static_cast<Unsigned<T>>(a) << amount);
  }
};
struct ShiftRight {
  template <typename T>
  static T apply(T a, uint32_t amount) {
    if (amount >= kBits<T>) return a < 0 ? static_cast<T>(-1) : T{0};
    return static_cast<T>(a >> amount);
  }
};

// ---- handlers

template <typename T, typename Function>
void shift(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  for_each_lane(mask, [=](int lane) {
    const auto amount = static_cast<uint32_t>(b[lane]);
    d[lane] = to_register<T>(Function::template apply<T>(from_register<T>(a[lane]), amount));
  });
}
template <typename Function>
Handler shift_for(Type type) {
  return for_integer(type, []<typename T>() -> Handler { return shift<T, Function>; });
}

// mul.wide and mad.wide: the product and the addend have twice the width.
template <typename T, typename Wide, bool kAdd>
void multiply_wide(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = kAdd ? row(warp, instruction.operands[3]) : a;
  for_each_lane(mask, [=](int lane) {
    const Wide x = from_register<T>(a[lane]);
    const Wide y = from_register<T>(b[lane]);
    Wide result = MultiplyLow::apply<Wide>(x, y);
    if (kAdd) result = Add::apply<Wide>(result, from_register<Wide>(c[lane]));
    d[lane] = to_register<Wide>(result);
  });
}
template <bool kAdd>
Handler multiply_wide_for(Type type) {
  switch (type) {
    case Type::kU16:
      return multiply_wide<uint16_t, uint32_t, kAdd>;
    case Type::kS16:
      return multiply_wide<int16_t, int32_t, kAdd>;
    case Type::kU32:
    case Type::kB32:
      return multiply_wide<uint32_t, uint64_t, kAdd>;
    case Type::kS32:
      return multiply_wide<int32_t, int64_t, kAdd>;
    default:
      return nullptr;
  }
}

// mul24 and mad24: of the lower 24 bits; .hi are the upper 32 of the 48 of the product.
void multiply_24(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = instruction.num_operands > 3 ? row(warp, instruction.operands[3]) : nullptr;
  const bool is_signed = instruction.type == Type::kS32;
  const bool high = instruction.flag;
  const auto low_24 = [=](uint64_t bits) -> int64_t {
    const auto shifted = static_cast<uint32_t>(bits) << 8;
    return is_signed ? static_cast<int32_t>(shifted) >> 8 : static_cast<int64_t>(shifted >> 8);
  };
  for_each_lane(mask, [=](int lane) {
    const auto product = static_cast<uint64_t>(low_24(a[lane]) * low_24(b[lane]));
    auto result = static_cast<uint32_t>(high ? product >> 16 : product);
    if (c) result += static_cast<uint32_t>(c[lane]);
    d[lane] = result;
  });
}

// The instructions with .cc, and addc, subc, madc, which take the carry of the one before.
enum class CarryOperation : uint8_t { kAdd, kSubtract, kMultiplyLow, kMultiplyHigh };

template <typename T, CarryOperation kOperation>
void with_carry(Warp& warp, const Instruction& instruction, uint32_t mask) {
  using Wide = unsigned __int128;
  constexpr bool kMultiply = kOperation >= CarryOperation::kMultiplyLow;
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = kMultiply ? row(warp, instruction.operands[3]) : a;
  const bool signed_values = is_signed(instruction.type);
  uint32_t carries = warp.carry;
  for_each_lane(mask, [&](int lane) {
    T x = static_cast<T>(a[lane]);
    T y = static_cast<T>(b[lane]);
    const uint32_t carry_in = instruction.carry_in ? (carries >> lane) & 1 : 0;
    if constexpr (kMultiply) {
      using Signed = std::make_signed_t<T>;
      const Wide product = signed_values
                               ? static_cast<Wide>(static_cast<__int128>(static_cast<Signed>(x)) *
                                                   static_cast<Signed>(y))
                               : static_cast<Wide>(x) * y;
      x = static_cast<T>(kOperation == CarryOperation::kMultiplyHigh ? product >> kBits<T>
                                                                     : product);
      y = static_cast<T>(c[lane]);
    }
    bool carry_out = false;
    if constexpr (kOperation == CarryOperation::kSubtract) {
      d[lane] = static_cast<T>(x - y - carry_in);
      carry_out = static_cast<Wide>(x) < static_cast<Wide>(y) + carry_in;
    } else {
      const Wide sum = static_cast<Wide>(x) + y + carry_in;
      d[lane] = static_cast<T>(sum);
      carry_out = (sum >> kBits<T>)&1;
    }
    if (instruction.carry_out)
      carries = (carries & ~(1u << lane)) | (static_cast<uint32_t>(carry_out) << lane);
  });
  warp.carry = carries;
}
template <CarryOperation kOperation>
Handler with_carry_for(Type type) {
  return size_of(type) == 8 ? with_carry<uint64_t, kOperation> : with_carry<uint32_t, kOperation>;
}

// add, min and max on two packed 16-bit integers.
template <typename T, typename Function>
void packed_16(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const bool relu = instruction.relu;
  for_each_lane(mask, [=](int lane) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      T value = Function::template apply<T>(static_cast<T>(a[lane] >> shift),
                                            static_cast<T>(b[lane] >> shift));
      if (relu && value < 0) value = 0;
      result |= static_cast<uint32_t>(static_cast<uint16_t>(value)) << shift;
    }
    d[lane] = result;
  });
}
template <typename Function>
Handler packed_16_for(Type type) {
  return type == Type::kS16x2 ? packed_16<int16_t, Function> : packed_16<uint16_t, Function>;
}

// Any function of three bits: bit 4 a + 2 b + c of the table is the result. A form with a predicate
// also tells whether the result is zero.
void lop3(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const auto table = static_cast<uint32_t>(instruction.immediate);
  const bool has_predicate = instruction.flag;
  const uint32_t other = has_predicate ? true_lanes(warp, instruction.operands[5], mask) : 0;
  uint32_t not_zero = 0;
  for_each_lane(mask, [&](int lane) {
    const auto x = static_cast<uint32_t>(a[lane]);
    const auto y = static_cast<uint32_t>(b[lane]);
    const auto z = static_cast<uint32_t>(c[lane]);
    uint32_t result = 0;
    if (table & 0x01) result |= ~x & ~y & ~z;
    if (table & 0x02) result |= ~x & ~y & z;
    if (table & 0x04) result |= ~x & y & ~z;
    if (table & 0x08) result |= ~x & y & z;
    if (table & 0x10) result |= x & ~y & ~z;
    if (table & 0x20) result |= x & ~y & z;
    if (table & 0x40) result |= x & y & ~z;
    if (table & 0x80) result |= x & y & z;
    d[lane] = result;
    if (result) not_zero |= 1u << lane;
  });
  if (!has_predicate || !instruction.has_second_output) return;
  const bool is_and = instruction.second_flag;
  set_predicate(warp, instruction.second_output, mask,
                is_and ? not_zero & other : not_zero | other);
}

// shf: of the 64 bits of b above a, the upper 32 shifted left or the lower 32 shifted right.
void funnel_shift(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const bool left = instruction.flag;
  const bool clamp = instruction.second_flag;
  for_each_lane(mask, [=](int lane) {
    auto amount = static_cast<uint32_t>(c[lane]);
    amount = clamp ? std::min(amount, 32u) : amount & 31;
    const uint64_t both = b[lane] << 32 | static_cast<uint32_t>(a[lane]);
    d[lane] = static_cast<uint32_t>(left ? (both << amount) >> 32 : both >> amount);
    if (left && amount == 32) d[lane] = static_cast<uint32_t>(a[lane]);
  });
}

// bfe: `length` bits from `position` on; beyond the highest bit, zeros or the sign.
void extract_bits(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const bool signed_values = is_signed(instruction.type);
  const int width = size_of(instruction.type) * 8;
  for_each_lane(mask, [=](int lane) {
    const uint64_t value = low_bytes(a[lane], width / 8);
    const int position = b[lane] & 0xff;
    const int length = c[lane] & 0xff;
    const int last = std::min(position + length - 1, width - 1);
    const uint64_t fill = signed_values && length > 0 ? (value >> last) & 1 : 0;
    uint64_t result = 0;
    for (int i = 0; i < width; i++) {
      const bool inside = i < length && position + i < width;
      result |= (inside ? (value >> (position + i)) & 1 : fill) << i;
    }
    d[lane] = result;
  });
}

// bfi: the lower `length` bits of a replace those of b from `position` on.
void insert_bits(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const uint64_t* e = row(warp, instruction.operands[4]);
  const int width = size_of(instruction.type) * 8;
  for_each_lane(mask, [=](int lane) {
    uint64_t result = low_bytes(b[lane], width / 8);
    const int position = c[lane] & 0xff;
    const int length = e[lane] & 0xff;
    for (int i = 0; i < length && position + i < width; i++) {
      const uint64_t bit = (a[lane] >> i) & 1;
      result = (result & ~(uint64_t{1} << (position + i))) | (bit << (position + i));
    }
    d[lane] = result;
  });
}

struct CountLeadingZeros {
  template <typename T>
  static uint32_t apply(T a) {
    return std::countl_zero(static_cast<Unsigned<T>>(a));
  }
};
struct PopulationCount {
  template <typename T>
  static uint32_t apply(T a) {
    return std::popcount(static_cast<Unsigned<T>>(a));
  }
};
struct ReverseBits {
  template <typename T>
  static T apply(T a) {
    T result = 0;
    for (int i = 0; i < kBits<T>; i++) result |= ((a >> i) & T{1}) << (kBits<T> - 1 - i);
    return result;
  }
};
// The highest bit that is one, of a negative number the highest zero; all ones if there is none.
template <bool kShiftAmount>
struct FindHighestBit {
  template <typename T>
  static uint32_t apply(T a) {
    const auto bits = static_cast<Unsigned<T>>(a < 0 ? ~a : a);
    if (bits == 0) return 0xffffffff;
    const uint32_t zeros = std::countl_zero(bits);
    return kShiftAmount ? zeros : kBits<T> - 1 - zeros;
  }
};

// A function whose result is a number of 32 bits, whatever it counts in.
template <typename T, typename Function>
void count(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  for_each_lane(
      mask, [=](int lane) { d[lane] = Function::template apply<T>(from_register<T>(a[lane])); });
}
template <typename Function>
Handler count_for(Type type) {
  return for_integer(type, []<typename T>() -> Handler { return count<T, Function>; });
}

// Selectors of prmt's modes, by the lower two bits of its third operand.
constexpr std::string_view kPermuteModes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
constexpr uint16_t kPermuteSelectors[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
    {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
    {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};

void permute(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const int mode = instruction.immediate;
  for_each_lane(mask, [=](int lane) {
    const uint64_t bytes = b[lane] << 32 | static_cast<uint32_t>(a[lane]);
    const auto selector =
        mode < 0 ? static_cast<uint32_t>(c[lane]) : kPermuteSelectors[mode][c[lane] & 3];
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
      const uint32_t choice = (selector >> (4 * i)) & 15;
      uint32_t byte = (bytes >> (8 * (choice & 7))) & 0xff;
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, eight times
      result |= byte << (8 * i);
    }
    d[lane] = result;
  });
}

// fns: the |offset|-th bit that is one, from `base` up or down; all ones if there is none.
uint32_t find_nth_set(uint32_t bits, uint32_t base, int32_t offset) {
  constexpr uint32_t kNone = 0xffffffff;
  if (base >= 32) return kNone;
  if (offset == 0) return (bits >> base) & 1 ? base : kNone;
  const int step = offset > 0 ? 1 : -1;
  int to_skip = std::abs(offset) - 1;
  for (int i = static_cast<int>(base); i >= 0 && i < 32; i += step) {
    if (!((bits >> i) & 1)) continue;
    if (to_skip-- == 0) return i;
  }
  return kNone;
}
void fns(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  for_each_lane(mask, [=](int lane) {
    d[lane] = find_nth_set(static_cast<uint32_t>(a[lane]), static_cast<uint32_t>(b[lane]),
                           static_cast<int32_t>(c[lane]));
  });
}

// Element i of `width` bits of a register.
int32_t packed_element(uint64_t bits, int i, int width, bool is_signed) {
  const auto shifted = static_cast<uint32_t>(bits >> (width * i)) << (32 - width);
  return is_signed ? static_cast<int32_t>(shifted) >> (32 - width)
                   : static_cast<int32_t>(shifted >> (32 - width));
}

// dp4a: c plus four products of bytes; dp2a: plus two of 16-bit values with bytes, the lower or
// upper two.
void dot_product(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const int products = instruction.immediate;
  const int first_b = instruction.flag ? 2 : 0;
  const bool a_signed = instruction.type == Type::kS32;
  const bool b_signed = instruction.source_type == Type::kS32;
  for_each_lane(mask, [=](int lane) {
    auto sum = static_cast<uint32_t>(c[lane]);
    for (int i = 0; i < products; i++)
      sum += static_cast<uint32_t>(packed_element(a[lane], i, 32 / products, a_signed) *
                                   packed_element(b[lane], first_b + i, 8, b_signed));
    d[lane] = sum;
  });
}

// bmsk: b ones from bit a on.
void bit_mask(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const bool clamp = instruction.flag;
  const auto limited = [=](uint64_t x) {
    return clamp ? std::min(static_cast<uint32_t>(x), 32u) : static_cast<uint32_t>(x & 31);
  };
  for_each_lane(mask, [=](int lane) {
    const uint64_t ones = (uint64_t{1} << limited(b[lane])) - 1;
    d[lane] = static_cast<uint32_t>(ones << limited(a[lane]));
  });
}

// szext: the lower bits, with zeros or the sign above them.
void extend(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const bool clamp = instruction.flag;
  const bool signed_values = is_signed(instruction.type);
  for_each_lane(mask, [=](int lane) {
    const auto length =
        clamp ? std::min(static_cast<uint32_t>(b[lane]), 32u) : static_cast<uint32_t>(b[lane] & 31);
    const auto value = static_cast<uint32_t>(a[lane]);
    d[lane] = length == 0 ? 0
                          : static_cast<uint32_t>(
                                packed_element(value, 0, static_cast<int>(length), signed_values));
  });
}

// ---- decoding, by what the opcode's forms have in common

bool is_packed(Type type) { return type == Type::kU16x2 || type == Type::kS16x2; }

Handler decode_sum(const ParsedInstruction& parsed, Instruction& i) {
  const bool subtracts = parsed.opcode.starts_with("sub");
  i.carry_in = parsed.opcode.ends_with("c");
  i.carry_out = parsed.has("cc");
  if (i.carry_in || i.carry_out)
    return subtracts ? with_carry_for<CarryOperation::kSubtract>(i.type)
                     : with_carry_for<CarryOperation::kAdd>(i.type);
  if (is_packed(i.type)) return subtracts ? nullptr : packed_16_for<Add>(i.type);
  if (i.sat && i.type == Type::kS32)
    return subtracts ? binary<int32_t, AddSaturated<-1>> : binary<int32_t, AddSaturated<1>>;
  return subtracts ? binary_for<Subtract>(i.type) : binary_for<Add>(i.type);
}

Handler decode_product(const ParsedInstruction& parsed, Instruction& i) {
  const bool adds = parsed.opcode != "mul";
  const bool high = parsed.has("hi");
  i.carry_in = parsed.opcode == "madc";
  i.carry_out = parsed.has("cc");
  if (i.carry_in || i.carry_out)
    return high ? with_carry_for<CarryOperation::kMultiplyHigh>(i.type)
                : with_carry_for<CarryOperation::kMultiplyLow>(i.type);
  if (parsed.has("wide"))
    return adds ? multiply_wide_for<true>(i.type) : multiply_wide_for<false>(i.type);
  if (adds && high && i.sat) return ternary<int32_t, MultiplyHighAddSaturated>;
  if (adds)
    return high ? ternary_for<MultiplyAdd<MultiplyHigh>>(i.type)
                : ternary_for<MultiplyAdd<MultiplyLow>>(i.type);
  return high ? binary_for<MultiplyHigh>(i.type) : binary_for<MultiplyLow>(i.type);
}

template <typename Function>
Handler decode_extreme(const ParsedInstruction& parsed, const Instruction& i) {
  if (is_packed(i.type)) return packed_16_for<Function>(i.type);
  if (i.relu) return i.type == Type::kS32 ? binary<int32_t, Relu<Function>> : nullptr;
  if (parsed.operands.size() == 4) return ternary_for<Function>(i.type);
  return binary_for<Function>(i.type);
}

Handler decode_bits(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (op == "and") return binary_for<And>(i.type);
  if (op == "or") return binary_for<Or>(i.type);
  if (op == "xor") return binary_for<Xor>(i.type);
  if (op == "not") return unary_for<Not>(i.type);
  if (op == "cnot") return unary_for<LogicalNot>(i.type);
  if (op == "shl") return shift_for<ShiftLeft>(i.type);
  if (op == "shr") return shift_for<ShiftRight>(i.type);
  if (op == "clz") return count_for<CountLeadingZeros>(i.type);
  if (op == "popc") return count_for<PopulationCount>(i.type);
  if (op == "brev")
    return i.type == Type::kB64 ? unary<uint64_t, ReverseBits> : unary<uint32_t, ReverseBits>;
  if (op == "bfind")
    return parsed.has("shiftamt") ? count_for<FindHighestBit<true>>(i.type)
                                  : count_for<FindHighestBit<false>>(i.type);
  if (op == "bfe") return extract_bits;
  if (op == "bfi") return insert_bits;
  if (op == "fns") return fns;
  if (op == "lop3") {
    i.immediate = static_cast<int>(parsed.operands[4].integer);
    i.flag = parsed.operands.size() > 5;
    i.second_flag = parsed.has("and");
    return lop3;
  }
  if (op == "shf") {
    i.flag = parsed.has("l");
    i.second_flag = parsed.has("clamp");
    return funnel_shift;
  }
  if (op == "prmt") {
    i.immediate = modifier_among(parsed, kPermuteModes);
    return permute;
  }
  if (op == "bmsk" || op == "szext") {
    i.flag = parsed.has("clamp");
    return op == "bmsk" ? bit_mask : extend;
  }
  return nullptr;
}

}  // namespace

bool decode_integer(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (is_floating(i.type) || i.type == Type::kF32x2 || i.type == Type::kPred) return false;
  if (op == "add" || op == "addc" || op == "sub" || op == "subc") {
    i.execute = decode_sum(parsed, i);
  } else if (op == "mul" || op == "mad" || op == "madc") {
    i.execute = decode_product(parsed, i);
  } else if (op == "mul24" || op == "mad24") {
    i.flag = parsed.has("hi");
    i.execute = multiply_24;
  } else if (op == "div") {
    i.execute = binary_for<Divide>(i.type);
  } else if (op == "rem") {
    i.execute = binary_for<Remainder>(i.type);
  } else if (op == "min") {
    i.execute = decode_extreme<Minimum>(parsed, i);
  } else if (op == "max") {
    i.execute = decode_extreme<Maximum>(parsed, i);
  } else if (op == "abs") {
    i.execute = unary_for<Absolute>(i.type);
  } else if (op == "neg") {
    i.execute = unary_for<Negate>(i.type);
  } else if (op == "sad") {
    i.execute = ternary_for<SumOfDifference>(i.type);
  } else if (op == "dp4a" || op == "dp2a") {
    const std::vector<Type> types = parsed.types();
    if (types.size() != 2) return false;
    i.type = types[0];
    i.source_type = types[1];
    i.immediate = op == "dp4a" ? 4 : 2;
    i.flag = parsed.has("hi");
    i.execute = dot_product;
  } else {
    i.execute = decode_bits(parsed, i);
  }
  return i.execute != nullptr;
}

}  // namespace mergeme::ptx
