// Exchange between the lanes of a warp: shfl, vote, match, redux, elect, activemask.
#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

enum class Shuffle : uint8_t { kUp, kDown, kBfly, kIdx };
constexpr std::string_view kShuffles[] = {"up", "down", "bfly", "idx"};

// The lane that is read, and whether it is in range: the rule of the manual's pseudocode. The third
// source holds the bits of the lane that segments share above the clamp.
struct Source {
  int lane;
  bool in_range;
};
Source shuffle_source(Shuffle kind, int lane, uint32_t b, uint32_t c) {
  const int distance = static_cast<int>(b & 31);
  const int segment = static_cast<int>((c >> 8) & 31);
  const int clamp = static_cast<int>(c & 31);
  const int last = (lane & segment) | (clamp & ~segment);
  const int first = lane & segment;
  switch (kind) {
    case Shuffle::kUp:
      return {lane - distance, lane - distance >= last};
    case Shuffle::kDown:
      return {lane + distance, lane + distance <= last};
    case Shuffle::kBfly:
      return {lane ^ distance, (lane ^ distance) <= last};
    default: {
      const int source = first | (distance & ~segment);
      return {source, source <= last};
    }
  }
}

// A lane that is not there gives an undefined value: poison, and counted.
void shfl(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const uint64_t* b = row(warp, instruction.operands[2]);
  const uint64_t* c = row(warp, instruction.operands[3]);
  const auto kind = static_cast<Shuffle>(instruction.variant);
  uint64_t results[kWarpSize];
  uint32_t in_range = 0;
  for_each_lane(mask, [&](int lane) {
    Source source =
        shuffle_source(kind, lane, static_cast<uint32_t>(b[lane]), static_cast<uint32_t>(c[lane]));
    if (source.in_range)
      in_range |= 1u << lane;
    else
      source.lane = lane;
    const bool exists = source.lane >= 0 && source.lane < kWarpSize && (mask >> source.lane) & 1;
    results[lane] = exists ? static_cast<uint32_t>(a[source.lane]) : kPoison;
    if (!exists) warp.launch->statistics.shfl_undefined_reads++;
  });
  for_each_lane(mask, [&](int lane) { d[lane] = results[lane]; });
  if (instruction.has_second_output) set_predicate(warp, instruction.second_output, mask, in_range);
}

enum class Vote : uint8_t { kAll, kAny, kUni, kBallot };
constexpr std::string_view kVotes[] = {"all", "any", "uni", "ballot"};

void vote(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t lanes = true_lanes(warp, instruction.operands[1], mask);
  const auto kind = static_cast<Vote>(instruction.variant);
  if (kind == Vote::kBallot) {
    uint64_t* d = result_row(warp, instruction.operands[0]);
    for_each_lane(mask, [=](int lane) { d[lane] = lanes; });
    return;
  }
  const bool all = lanes == mask;
  const bool none = lanes == 0;
  const bool result = kind == Vote::kAll ? all : kind == Vote::kAny ? !none : all || none;
  set_predicate(warp, instruction.operands[0], mask, result ? mask : 0);
}

// match.any: the lanes with the same value; match.all: all lanes if they agree, else none.
void match(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const int bytes = size_of(instruction.type);
  uint32_t results[kWarpSize] = {};
  for_each_lane(mask, [&](int lane) {
    for_each_lane(mask, [&](int other) {
      if (low_bytes(a[lane], bytes) == low_bytes(a[other], bytes)) results[lane] |= 1u << other;
    });
  });
  const bool wants_all = instruction.flag;
  const bool agree = results[std::countr_zero(mask)] == mask;
  for_each_lane(mask, [&](int lane) { d[lane] = wants_all ? (agree ? mask : 0) : results[lane]; });
  if (wants_all && instruction.has_second_output)
    set_predicate(warp, instruction.second_output, mask, agree ? mask : 0);
}

constexpr std::string_view kReduxOperations[] = {"add", "min", "max", "and", "or", "xor"};
enum class Redux : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

uint32_t combine(Redux operation, bool signed_values, uint32_t x, uint32_t y) {
  const auto signed_x = static_cast<int32_t>(x);
  const auto signed_y = static_cast<int32_t>(y);
  switch (operation) {
    case Redux::kAdd:
      return x + y;
    case Redux::kMin:
      return signed_values ? static_cast<uint32_t>(std::min(signed_x, signed_y)) : std::min(x, y);
    case Redux::kMax:
      return signed_values ? static_cast<uint32_t>(std::max(signed_x, signed_y)) : std::max(x, y);
    case Redux::kAnd:
      return x & y;
    case Redux::kOr:
      return x | y;
    default:
      return x ^ y;
  }
}

void redux(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const auto operation = static_cast<Redux>(instruction.variant);
  const bool signed_values = is_signed(instruction.type);
  const int first = std::countr_zero(mask);
  auto result = static_cast<uint32_t>(a[first]);
  for_each_lane(mask & (mask - 1), [&](int lane) {
    result = combine(operation, signed_values, result, static_cast<uint32_t>(a[lane]));
  });
  for_each_lane(mask, [=](int lane) { d[lane] = result; });
}

// min and max of f32; a NaN counts only with .NaN, or if there is nothing else.
void redux_f32(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  const bool is_min = static_cast<Redux>(instruction.variant) == Redux::kMin;
  const MinMaxRules rules{.nan = instruction.nan};
  const auto load = [&](int lane) {
    const auto x = from_register<float>(a[lane]);
    return instruction.abs ? std::fabs(x) : x;
  };
  float result = load(std::countr_zero(mask));
  for_each_lane(mask & (mask - 1), [&](int lane) {
    const float x = load(lane);
    result = is_min ? min_or_max<false>(result, x, rules) : min_or_max<true>(result, x, rules);
  });
  const uint64_t bits = canonical(result);
  for_each_lane(mask, [=](int lane) { d[lane] = bits; });
}

// The lowest lane is elected.
void elect(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const auto leader = static_cast<uint32_t>(std::countr_zero(mask));
  if (instruction.operands[0].kind != OperandKind::kSink) {
    uint64_t* d = result_row(warp, instruction.operands[0]);
    for_each_lane(mask, [=](int lane) { d[lane] = leader; });
  }
  if (instruction.has_second_output)
    set_predicate(warp, instruction.second_output, mask, 1u << leader);
}

void activemask(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  for_each_lane(mask, [=](int lane) { d[lane] = mask; });
}

// The race check takes note of it where all lanes meet.
void meet(Warp& warp, const Instruction&, uint32_t mask) {
  if (mask == warp.alive) warp.warp_barriers++;
}

// The lanes of operand `member_mask` carry it out together.
bool synchronised(Instruction& i, Handler handler, int member_mask) {
  i.control = Control::kWarpSync;
  i.member_mask = member_mask;
  i.execute = handler;
  return true;
}

}  // namespace

bool decode_warp(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (op == "activemask") {
    i.execute = activemask;
    return true;
  }
  if (op == "elect") return synchronised(i, elect, 1);
  if ((op == "bar" || op == "barrier") && parsed.has("warp")) return synchronised(i, meet, 0);
  if (!parsed.has("sync")) return false;
  if (op == "shfl") {
    const int kind = modifier_among(parsed, kShuffles);
    if (kind < 0) return false;
    i.variant = static_cast<uint8_t>(kind);
    return synchronised(i, shfl, 4);
  }
  if (op == "vote") {
    const int kind = modifier_among(parsed, kVotes);
    if (kind < 0) return false;
    i.variant = static_cast<uint8_t>(kind);
    return synchronised(i, vote, 2);
  }
  if (op == "match") {
    i.flag = parsed.has("all");
    return synchronised(i, match, 2);
  }
  if (op == "redux") {
    const int operation = modifier_among(parsed, kReduxOperations);
    if (operation < 0) return false;
    i.variant = static_cast<uint8_t>(operation);
    return synchronised(i, i.type == Type::kF32 ? redux_f32 : redux, 2);
  }
  return false;
}

}  // namespace mergeme::ptx
