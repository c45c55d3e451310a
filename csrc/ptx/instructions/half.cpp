// Arithmetic on f16 and bf16, single and packed: formed in a wider format and rounded once.
#include <algorithm>

#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

struct Half {
  static constexpr Type kType = Type::kF16;
  static float load(uint16_t bits) { return half_to_float(bits); }
  static uint16_t store(float x) { return float_to_half(x); }
};
struct BFloat16 {
  static constexpr Type kType = Type::kBF16;
  static float load(uint16_t bits) { return bfloat16_to_float(bits); }
  static uint16_t store(float x) { return float_to_bfloat16(x); }
};

template <typename Format>
uint16_t round_once(double exact) {
  return static_cast<uint16_t>(encode_float(exact, Format::kType, Rounding::kRn, false));
}

// ---- functions of one lane. A sum or product of two f16 rounded to f32 and again to f16 is what
// one rounding gives; bf16 has f32's exponents, so that this does not hold for its denormals.

struct Add {
  template <typename Format>
  static uint16_t apply(float x, float y, float, const MinMaxRules&) {
    if constexpr (Format::kType == Type::kF16)
      return Format::store(x + y);
    else
      return round_once<Format>(sum_to_odd(x, y));
  }
};
struct Subtract {
  template <typename Format>
  static uint16_t apply(float x, float y, float z, const MinMaxRules& rules) {
    return Add::apply<Format>(x, -y, z, rules);
  }
};
struct Multiply {
  template <typename Format>
  static uint16_t apply(float x, float y, float, const MinMaxRules&) {
    if constexpr (Format::kType == Type::kF16)
      return Format::store(x * y);
    else
      return round_once<Format>(double{x} * y);
  }
};
struct FusedMultiplyAdd {
  template <typename Format>
  static uint16_t apply(float x, float y, float z, const MinMaxRules&) {
    return round_once<Format>(sum_to_odd(double{x} * y, z));
  }
};
template <bool kMax>
struct Extreme {
  template <typename Format>
  static uint16_t apply(float x, float y, float, const MinMaxRules& rules) {
    return Format::store(min_or_max<kMax>(x, y, rules));
  }
};
template <bool kMax>
struct ExtremeOfThree {
  template <typename Format>
  static uint16_t apply(float x, float y, float z, const MinMaxRules& rules) {
    return Format::store(min_or_max<kMax>(min_or_max<kMax>(x, y, rules), z, rules));
  }
};
struct Exp2 {
  template <typename Format>
  static uint16_t apply(float x, float, float, const MinMaxRules&) {
    return round_once<Format>(std::exp2(double{x}));
  }
};
struct Tanh {
  template <typename Format>
  static uint16_t apply(float x, float, float, const MinMaxRules&) {
    return round_once<Format>(std::tanh(double{x}));
  }
};

float flush_denormal_half(float x) {
  constexpr float kSmallestNormal = 6.103515625e-05f;
  return std::fabs(x) < kSmallestNormal ? std::copysign(0.0f, x) : x;
}

// One element, with the modifiers that change operands and results. bf16 has no .ftz.
template <typename Format, typename Function>
uint16_t compute(const Instruction& instruction, uint16_t a, uint16_t b, uint16_t c) {
  const bool ftz = instruction.ftz && Format::kType == Type::kF16;
  float x = Format::load(a);
  float y = Format::load(b);
  float z = Format::load(c);
  if (ftz) {
    x = flush_denormal_half(x);
    y = flush_denormal_half(y);
    z = flush_denormal_half(z);
  }
  const MinMaxRules rules{instruction.nan, instruction.xorsign, instruction.abs};
  uint16_t result = Function::template apply<Format>(x, y, z, rules);
  if (ftz && !(result & 0x7c00)) result &= 0x8000;
  if (instruction.sat) result = Format::store(saturate(Format::load(result)));
  if (instruction.relu) {
    const float value = Format::load(result);
    if (value != value) return 0x7fff;
    if (std::signbit(value)) return 0;
  }
  return result;
}

template <typename Format, typename Function, bool kPacked>
void half(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const auto row_or_first = [&](int k) {
    return row(warp, instruction.operands[k < instruction.num_operands ? k : 1]);
  };
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row_or_first(1);
  const uint64_t* b = row_or_first(2);
  const uint64_t* c = row_or_first(3);
  for_each_lane(mask, [&](int lane) {
    uint32_t result = 0;
    for (int shift = 0; shift < (kPacked ? 32 : 16); shift += 16) {
      const uint32_t element = compute<Format, Function>(
          instruction, static_cast<uint16_t>(a[lane] >> shift),
          static_cast<uint16_t>(b[lane] >> shift), static_cast<uint16_t>(c[lane] >> shift));
      result |= element << shift;
    }
    d[lane] = result;
  });
}

template <typename Function>
Handler for_type(Type type) {
  switch (type) {
    case Type::kF16:
      return half<Half, Function, false>;
    case Type::kF16x2:
      return half<Half, Function, true>;
    case Type::kBF16:
      return half<BFloat16, Function, false>;
    case Type::kBF16x2:
      return half<BFloat16, Function, true>;
    default:
      return nullptr;
  }
}

bool is_packed(Type type) { return type == Type::kF16x2 || type == Type::kBF16x2; }

template <bool kAbs>
void change_sign(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint32_t signs = is_packed(instruction.type) ? 0x80008000 : 0x8000;
  const uint32_t all = is_packed(instruction.type) ? 0xffffffff : 0xffff;
  for_each_lane(mask, [=](int lane) {
    const uint32_t bits = static_cast<uint32_t>(a[lane]) & all;
    d[lane] = kAbs ? bits & ~signs : bits ^ signs;
  });
}

template <bool kMax>
Handler decode_extreme(const ParsedInstruction& parsed, Type type) {
  return parsed.operands.size() == 4 ? for_type<ExtremeOfThree<kMax>>(type)
                                     : for_type<Extreme<kMax>>(type);
}

}  // namespace

bool decode_half(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (for_type<Add>(i.type) == nullptr) return false;
  if (op == "add") {
    i.execute = for_type<Add>(i.type);
  } else if (op == "sub") {
    i.execute = for_type<Subtract>(i.type);
  } else if (op == "mul") {
    i.execute = for_type<Multiply>(i.type);
  } else if (op == "fma") {
    i.execute = for_type<FusedMultiplyAdd>(i.type);
  } else if (op == "min") {
    i.execute = decode_extreme<false>(parsed, i.type);
  } else if (op == "max") {
    i.execute = decode_extreme<true>(parsed, i.type);
  } else if (op == "ex2") {
    i.execute = for_type<Exp2>(i.type);
  } else if (op == "tanh") {
    i.execute = for_type<Tanh>(i.type);
  } else if (op == "neg") {
    i.execute = change_sign<false>;
  } else if (op == "abs") {
    i.execute = change_sign<true>;
  }
  return i.execute != nullptr;
}

}  // namespace mergeme::ptx
