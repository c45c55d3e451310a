// Arithmetic on f32 and f64.
#include <algorithm>
#include <limits>

#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

// ---- functions of one lane. Approximations are computed exactly and rounded: hardware is less
// exact, and how much less is no concern of a test of kernels.

struct Add {
  template <typename T>
  static T apply(T x, T y, T, const MinMaxRules&) {
    return x + y;
  }
};
struct Subtract {
  template <typename T>
  static T apply(T x, T y, T, const MinMaxRules&) {
    return x - y;
  }
};
struct Multiply {
  template <typename T>
  static T apply(T x, T y, T, const MinMaxRules&) {
    return x * y;
  }
};
struct FusedMultiplyAdd {
  template <typename T>
  static T apply(T x, T y, T z, const MinMaxRules&) {
    return std::fma(x, y, z);
  }
};
struct Divide {
  template <typename T>
  static T apply(T x, T y, T, const MinMaxRules&) {
    return x / y;
  }
};
template <bool kMax>
struct Extreme {
  template <typename T>
  static T apply(T x, T y, T, const MinMaxRules& rules) {
    return min_or_max<kMax>(x, y, rules);
  }
};
template <bool kMax>
struct ExtremeOfThree {
  template <typename T>
  static T apply(T x, T y, T z, const MinMaxRules& rules) {
    return min_or_max<kMax>(min_or_max<kMax>(x, y, rules), z, rules);
  }
};
struct Reciprocal {
  template <typename T>
  static T apply(T x, T, T, const MinMaxRules&) {
    return T{1} / x;
  }
};
struct SquareRoot {
  template <typename T>
  static T apply(T x, T, T, const MinMaxRules&) {
    return std::sqrt(x);
  }
};
template <double (*kFunction)(double)>
struct ThroughDouble {
  template <typename T>
  static T apply(T x, T, T, const MinMaxRules&) {
    return static_cast<T>(kFunction(x));
  }
};
double reciprocal_square_root(double x) { return 1.0 / std::sqrt(x); }
double exp2_double(double x) { return std::exp2(x); }
double log2_double(double x) { return std::log2(x); }
double sin_double(double x) { return std::sin(x); }
double cos_double(double x) { return std::cos(x); }
double tanh_double(double x) { return std::tanh(x); }

// ---- handlers. Missing operands are read as the first one, and not used. The loops are kept out
// of line, so that nothing moves across the change of rounding around them.

const uint64_t* row_or_first(const Warp& warp, const Instruction& instruction, int k) {
  return row(warp, instruction.operands[k < instruction.num_operands ? k : 1]);
}
MinMaxRules rules_of(const Instruction& instruction) {
  return {instruction.nan, instruction.xorsign, instruction.abs};
}

template <typename Function, bool kFtz, bool kSat>
[[gnu::noinline]] void f32_loop(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row_or_first(warp, instruction, 2);
  const uint64_t* c = row_or_first(warp, instruction, 3);
  const MinMaxRules rules = rules_of(instruction);
  for_each_lane(mask, [=](int lane) {
    float x = from_register<float>(a[lane]);
    float y = from_register<float>(b[lane]);
    float z = from_register<float>(c[lane]);
    if (kFtz) {
      x = flush_denormal(x);
      y = flush_denormal(y);
      z = flush_denormal(z);
    }
    float result = Function::template apply<float>(x, y, z, rules);
    if (kFtz) result = flush_denormal(result);
    if (kSat) result = saturate(result);
    d[lane] = canonical(result);
  });
}

template <typename Function>
void f32(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const RoundingScope scope(instruction.rounding);
  if (instruction.ftz && instruction.sat)
    f32_loop<Function, true, true>(warp, instruction, mask);
  else if (instruction.ftz)
    f32_loop<Function, true, false>(warp, instruction, mask);
  else if (instruction.sat)
    f32_loop<Function, false, true>(warp, instruction, mask);
  else
    f32_loop<Function, false, false>(warp, instruction, mask);
}

template <typename Function>
[[gnu::noinline]] void f64_loop(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row_or_first(warp, instruction, 2);
  const uint64_t* c = row_or_first(warp, instruction, 3);
  const MinMaxRules rules = rules_of(instruction);
  for_each_lane(mask, [=](int lane) {
    d[lane] = canonical(Function::template apply<double>(from_register<double>(a[lane]),
                                                         from_register<double>(b[lane]),
                                                         from_register<double>(c[lane]), rules));
  });
}

template <typename Function>
void f64(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const RoundingScope scope(instruction.rounding);
  f64_loop<Function>(warp, instruction, mask);
}

// Two f32 in one register of 64 bits.
template <typename Function>
[[gnu::noinline]] void f32x2_loop(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row_or_first(warp, instruction, 3);
  const bool ftz = instruction.ftz;
  const auto load = [=](uint64_t bits, int shift) {
    const float x = from_register<float>(bits >> shift);
    return ftz ? flush_denormal(x) : x;
  };
  for_each_lane(mask, [=](int lane) {
    uint64_t result = 0;
    for (int shift = 0; shift < 64; shift += 32) {
      float value = Function::template apply<float>(load(a[lane], shift), load(b[lane], shift),
                                                    load(c[lane], shift), {});
      if (ftz) value = flush_denormal(value);
      result |= canonical(value) << shift;
    }
    d[lane] = result;
  });
}
template <typename Function>
void f32x2(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const RoundingScope scope(instruction.rounding);
  f32x2_loop<Function>(warp, instruction, mask);
}

template <typename Function>
Handler for_type(Type type) {
  if (type == Type::kF32) return f32<Function>;
  if (type == Type::kF64) return f64<Function>;
  if (type == Type::kF32x2) return f32x2<Function>;
  return nullptr;
}
template <double (*kFunction)(double)>
Handler approximation(Type type) {
  return type == Type::kF32 ? f32<ThroughDouble<kFunction>> : nullptr;
}

// neg and abs change the sign alone; of a NaN of f32 they make the canonical one.
template <bool kAbs>
void change_sign(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  if (instruction.type == Type::kF64) {
    constexpr uint64_t kSign = uint64_t{1} << 63;
    for_each_lane(mask, [=](int lane) { d[lane] = kAbs ? a[lane] & ~kSign : a[lane] ^ kSign; });
    return;
  }
  constexpr uint32_t kSign = 0x80000000;
  const bool ftz = instruction.ftz;
  for_each_lane(mask, [=](int lane) {
    auto bits = static_cast<uint32_t>(a[lane]);
    if (ftz) bits = std::bit_cast<uint32_t>(flush_denormal(std::bit_cast<float>(bits)));
    bits = kAbs ? bits & ~kSign : bits ^ kSign;
    d[lane] = canonical(std::bit_cast<float>(bits));
  });
}

// The magnitude of b with the sign of a.
void copy_sign(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const int bytes = size_of(instruction.type);
  const uint64_t sign = uint64_t{1} << (8 * bytes - 1);
  for_each_lane(
      mask, [=](int lane) { d[lane] = low_bytes((b[lane] & ~sign) | (a[lane] & sign), bytes); });
}

constexpr std::string_view kClasses[] = {"finite",     "infinite", "number",
                                         "notanumber", "normal",   "subnormal"};

bool is_of_class(double x, double smallest_normal, int number) {
  const bool subnormal = x != 0 && std::fabs(x) < smallest_normal;
  switch (number) {
    case 0:
      return std::isfinite(x);
    case 1:
      return std::isinf(x);
    case 2:
      return !std::isnan(x);
    case 3:
      return std::isnan(x);
    case 4:
      return std::isfinite(x) && x != 0 && !subnormal;
    default:
      return subnormal;
  }
}

void test_class(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint64_t* a = row(warp, instruction.operands[1]);
  const double smallest = instruction.type == Type::kF32 ? double{std::numeric_limits<float>::min()}
                                                         : std::numeric_limits<double>::min();
  uint32_t lanes = 0;
  for_each_lane(mask, [&](int lane) {
    const double x = decode_float(a[lane], instruction.type);
    if (is_of_class(x, smallest, instruction.immediate)) lanes |= 1u << lane;
  });
  set_predicate(warp, instruction.operands[0], mask, lanes);
}

template <bool kMax>
Handler decode_extreme(const ParsedInstruction& parsed, Type type) {
  if (type == Type::kF32x2) return nullptr;
  return parsed.operands.size() == 4 ? for_type<ExtremeOfThree<kMax>>(type)
                                     : for_type<Extreme<kMax>>(type);
}

}  // namespace

bool decode_floating(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  const Type type = i.type;
  if (type != Type::kF32 && type != Type::kF64 && type != Type::kF32x2) return false;
  const bool scalar = type != Type::kF32x2;
  if (op == "add") {
    i.execute = for_type<Add>(type);
  } else if (op == "sub") {
    i.execute = for_type<Subtract>(type);
  } else if (op == "mul") {
    i.execute = for_type<Multiply>(type);
  } else if (op == "fma" || op == "mad") {
    i.execute = for_type<FusedMultiplyAdd>(type);
  } else if (op == "div" && scalar) {
    i.execute = for_type<Divide>(type);
  } else if (op == "min") {
    i.execute = decode_extreme<false>(parsed, type);
  } else if (op == "max") {
    i.execute = decode_extreme<true>(parsed, type);
  } else if (op == "rcp" && scalar) {
    i.execute = for_type<Reciprocal>(type);
  } else if (op == "sqrt" && scalar) {
    i.execute = for_type<SquareRoot>(type);
  } else if (op == "rsqrt" && scalar) {
    i.execute = for_type<ThroughDouble<reciprocal_square_root>>(type);
  } else if (op == "ex2") {
    i.execute = approximation<exp2_double>(type);
  } else if (op == "lg2") {
    i.execute = approximation<log2_double>(type);
  } else if (op == "sin") {
    i.execute = approximation<sin_double>(type);
  } else if (op == "cos") {
    i.execute = approximation<cos_double>(type);
  } else if (op == "tanh") {
    i.execute = approximation<tanh_double>(type);
  } else if (op == "neg" && scalar) {
    i.execute = change_sign<false>;
  } else if (op == "abs" && scalar) {
    i.execute = change_sign<true>;
  } else if (op == "copysign" && scalar) {
    i.execute = copy_sign;
  } else if (op == "testp" && scalar) {
    i.immediate = modifier_among(parsed, kClasses);
    if (i.immediate >= 0) i.execute = test_class;
  }
  return i.execute != nullptr;
}

}  // namespace mergeme::ptx
