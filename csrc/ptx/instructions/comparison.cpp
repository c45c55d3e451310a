// setp, set, selp, slct, and logic on predicates.
#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

constexpr std::string_view kComparisons[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",
                                             "lo",  "ls",  "hi",  "hs",  "equ", "neu",
                                             "ltu", "leu", "gtu", "geu", "num", "nan"};

// How setp's third source is combined with what was compared.
enum BoolOperation : uint8_t { kFirst, kAnd, kOr, kXor, kNot };
constexpr std::string_view kBoolOperations[] = {"and", "or", "xor"};

uint32_t combine(uint8_t operation, uint32_t a, uint32_t b) {
  switch (operation) {
    case kAnd:
      return a & b;
    case kOr:
      return a | b;
    case kXor:
      return a ^ b;
    case kNot:
      return ~a;
    default:
      return a;
  }
}

// The lanes in which operands 1 and 2, read by `load`, satisfy a test.
template <typename Load, typename Test>
uint32_t lanes_where(const Warp& warp, const Instruction& instruction, uint32_t mask, Load load,
                     Test test) {
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  uint32_t lanes = 0;
  for_each_lane(mask,
                [&](int lane) { lanes |= uint32_t{test(load(a[lane]), load(b[lane]))} << lane; });
  return lanes;
}

// Comparisons ending in u are true of a NaN, the others are not. The choice is made outside the
// loop over lanes.
template <typename Load>
uint32_t compare_loaded(const Warp& warp, const Instruction& instruction, uint32_t mask,
                        Load load) {
  const auto where = [&](auto test) { return lanes_where(warp, instruction, mask, load, test); };
  switch (instruction.comparison) {
    case Comparison::kEq:
      return where([](auto x, auto y) { return x == y; });
    case Comparison::kNe:
      return where([](auto x, auto y) { return x < y || x > y; });
    case Comparison::kLt:
    case Comparison::kLo:
      return where([](auto x, auto y) { return x < y; });
    case Comparison::kLe:
    case Comparison::kLs:
      return where([](auto x, auto y) { return x <= y; });
    case Comparison::kGt:
    case Comparison::kHi:
      return where([](auto x, auto y) { return x > y; });
    case Comparison::kGe:
    case Comparison::kHs:
      return where([](auto x, auto y) { return x >= y; });
    case Comparison::kEqu:
      return where([](auto x, auto y) { return !(x < y || x > y); });
    case Comparison::kNeu:
      return where([](auto x, auto y) { return !(x == y); });
    case Comparison::kLtu:
      return where([](auto x, auto y) { return !(x >= y); });
    case Comparison::kLeu:
      return where([](auto x, auto y) { return !(x > y); });
    case Comparison::kGtu:
      return where([](auto x, auto y) { return !(x <= y); });
    case Comparison::kGeu:
      return where([](auto x, auto y) { return !(x < y); });
    case Comparison::kNum:
      return where([](auto x, auto y) { return x == x && y == y; });
    case Comparison::kNan:
      return where([](auto x, auto y) { return x != x || y != y; });
  }
  return 0;
}
template <typename T>
uint32_t compare_as(const Warp& warp, const Instruction& instruction, uint32_t mask) {
  return compare_loaded(warp, instruction, mask, from_register<T>);
}

// `shift` picks the element of packed operands.
uint32_t compare(const Warp& warp, const Instruction& instruction, uint32_t mask, int shift = 0) {
  const Comparison comparison = instruction.comparison;
  const bool without_sign = comparison >= Comparison::kLo && comparison <= Comparison::kHs;
  switch (instruction.source_type) {
    case Type::kF16:
    case Type::kF16x2:
      return compare_loaded(warp, instruction, mask, [=](uint64_t bits) {
        return half_to_float(static_cast<uint16_t>(bits >> shift));
      });
    case Type::kBF16:
    case Type::kBF16x2:
      return compare_loaded(warp, instruction, mask, [=](uint64_t bits) {
        return bfloat16_to_float(static_cast<uint16_t>(bits >> shift));
      });
    case Type::kF32:
      if (!instruction.ftz) return compare_as<float>(warp, instruction, mask);
      return compare_loaded(warp, instruction, mask, [](uint64_t bits) {
        return flush_denormal(from_register<float>(bits));
      });
    case Type::kF64:
      return compare_as<double>(warp, instruction, mask);
    case Type::kU8:
    case Type::kB8:
      return compare_as<uint8_t>(warp, instruction, mask);
    case Type::kS8:
      return compare_as<int8_t>(warp, instruction, mask);
    case Type::kU16:
    case Type::kB16:
      return compare_as<uint16_t>(warp, instruction, mask);
    case Type::kS16:
      return compare_as<int16_t>(warp, instruction, mask);
    case Type::kU32:
    case Type::kB32:
      return compare_as<uint32_t>(warp, instruction, mask);
    case Type::kS32:
      return without_sign ? compare_as<uint32_t>(warp, instruction, mask)
                          : compare_as<int32_t>(warp, instruction, mask);
    case Type::kU64:
    case Type::kB64:
      return compare_as<uint64_t>(warp, instruction, mask);
    case Type::kS64:
      return compare_as<int64_t>(warp, instruction, mask);
    default:
      return 0;
  }
}

bool is_packed(Type type) { return type == Type::kF16x2 || type == Type::kBF16x2; }

uint32_t third_source(const Warp& warp, const Instruction& instruction, uint32_t mask) {
  return instruction.num_operands > 3 ? true_lanes(warp, instruction.operands[3], mask) : 0;
}

// The second output is of the upper elements, or, of a plain comparison, its complement.
void setp(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t first = compare(warp, instruction, mask);
  const uint32_t second =
      is_packed(instruction.source_type) ? compare(warp, instruction, mask, 16) : ~first;
  const uint32_t other = third_source(warp, instruction, mask);
  set_predicate(warp, instruction.operands[0], mask,
                combine(instruction.bool_operation, first, other));
  if (instruction.has_second_output)
    set_predicate(warp, instruction.second_output, mask,
                  combine(instruction.bool_operation, second, other));
}

// What set stores for true: one as a number, or all ones.
uint64_t true_value(Type type) {
  switch (type) {
    case Type::kF32:
      return 0x3f800000;
    case Type::kF16:
    case Type::kF16x2:
      return 0x3c00;
    case Type::kBF16:
    case Type::kBF16x2:
      return 0x3f80;
    case Type::kU16:
    case Type::kS16:
      return 0xffff;
    default:
      return 0xffffffff;
  }
}

void set(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const bool packed = is_packed(instruction.source_type);
  const uint32_t other = third_source(warp, instruction, mask);
  const uint32_t first =
      combine(instruction.bool_operation, compare(warp, instruction, mask), other);
  const uint32_t second =
      packed ? combine(instruction.bool_operation, compare(warp, instruction, mask, 16), other) : 0;
  uint64_t value = true_value(instruction.type);
  if (packed) value &= 0xffff;
  for_each_lane(mask, [=](int lane) {
    uint64_t result = (first >> lane) & 1 ? value : 0;
    if ((second >> lane) & 1) result |= value << 16;
    d[lane] = result;
  });
}

void selp(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint32_t lanes = true_lanes(warp, instruction.operands[3], mask);
  const int bytes = size_of(instruction.type);
  for_each_lane(
      mask, [=](int lane) { d[lane] = low_bytes((lanes >> lane) & 1 ? a[lane] : b[lane], bytes); });
}

// a where c is not negative, else b.
void slct(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const bool by_float = instruction.source_type == Type::kF32;
  const int bytes = size_of(instruction.type);
  for_each_lane(mask, [=](int lane) {
    const bool first =
        by_float ? from_register<float>(c[lane]) >= 0 : from_register<int32_t>(c[lane]) >= 0;
    d[lane] = low_bytes(first ? a[lane] : b[lane], bytes);
  });
}

void predicate_logic(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t a = true_lanes(warp, instruction.operands[1], mask);
  const uint32_t b =
      instruction.num_operands > 2 ? true_lanes(warp, instruction.operands[2], mask) : 0;
  set_predicate(warp, instruction.operands[0], mask, combine(instruction.bool_operation, a, b));
}

bool decode_predicate_logic(const std::string& op, Instruction& i) {
  if (op == "mov")
    i.bool_operation = kFirst;
  else if (op == "and")
    i.bool_operation = kAnd;
  else if (op == "or")
    i.bool_operation = kOr;
  else if (op == "xor")
    i.bool_operation = kXor;
  else if (op == "not")
    i.bool_operation = kNot;
  else
    return false;
  i.execute = predicate_logic;
  return true;
}

}  // namespace

bool decode_comparison(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  const std::vector<Type> types = parsed.types();
  if (op == "setp" || op == "set") {
    const int comparison = modifier_among(parsed, kComparisons);
    if (comparison < 0 || types.empty()) return false;
    i.comparison = static_cast<Comparison>(comparison);
    i.bool_operation = static_cast<uint8_t>(modifier_among(parsed, kBoolOperations) + 1);
    i.type = types.front();
    i.source_type = types.back();
    i.execute = op == "setp" ? setp : set;
    return true;
  }
  if (op == "selp") {
    i.execute = selp;
    return true;
  }
  if (op == "slct") {
    if (types.size() != 2) return false;
    i.type = types[0];
    i.source_type = types[1];
    i.execute = slct;
    return true;
  }
  return i.type == Type::kPred && decode_predicate_logic(op, i);
}

}  // namespace mergeme::ptx
