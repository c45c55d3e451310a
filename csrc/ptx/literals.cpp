#include "csrc/ptx/literals.h"

#include <array>
#include <bit>
#include <cstdlib>
#include <unordered_map>

namespace mergeme::ptx {
namespace {

struct TypeName {
  std::string_view name;
  Type type;
  int bytes;
};

constexpr std::array kTypes{
    TypeName{"pred", Type::kPred, 1},       TypeName{"b8", Type::kB8, 1},
    TypeName{"b16", Type::kB16, 2},         TypeName{"b32", Type::kB32, 4},
    TypeName{"b64", Type::kB64, 8},         TypeName{"b128", Type::kB128, 16},
    TypeName{"u8", Type::kU8, 1},           TypeName{"u16", Type::kU16, 2},
    TypeName{"u32", Type::kU32, 4},         TypeName{"u64", Type::kU64, 8},
    TypeName{"s8", Type::kS8, 1},           TypeName{"s16", Type::kS16, 2},
    TypeName{"s32", Type::kS32, 4},         TypeName{"s64", Type::kS64, 8},
    TypeName{"f16", Type::kF16, 2},         TypeName{"f16x2", Type::kF16x2, 4},
    TypeName{"bf16", Type::kBF16, 2},       TypeName{"bf16x2", Type::kBF16x2, 4},
    TypeName{"f32", Type::kF32, 4},         TypeName{"f64", Type::kF64, 8},
    TypeName{"tf32", Type::kTF32, 4},       TypeName{"e4m3", Type::kE4M3, 1},
    TypeName{"e5m2", Type::kE5M2, 1},       TypeName{"e4m3x2", Type::kE4M3x2, 2},
    TypeName{"e5m2x2", Type::kE5M2x2, 2},   TypeName{"u16x2", Type::kU16x2, 4},
    TypeName{"s16x2", Type::kS16x2, 4},     TypeName{"f32x2", Type::kF32x2, 8},
    TypeName{"ue8m0x2", Type::kUE8M0x2, 2}, TypeName{"s4", Type::kS4, 1},
    TypeName{"u4", Type::kU4, 1},           TypeName{"b1", Type::kB1, 1},
};

constexpr bool types_are_in_order() {
  for (size_t k = 0; k < kTypes.size(); k++)
    if (kTypes[k].type != static_cast<Type>(k + 1)) return false;
  return true;
}
static_assert(types_are_in_order(), "size_of and name_of look a type up by its number");

const std::unordered_map<std::string_view, SpecialRegister>& special_registers() {
  using enum SpecialRegister;
  static const std::unordered_map<std::string_view, SpecialRegister> names{
      {"%tid.x", kTidX},
      {"%tid.y", kTidY},
      {"%tid.z", kTidZ},
      {"%tid.w", kZero},
      {"%ntid.x", kNtidX},
      {"%ntid.y", kNtidY},
      {"%ntid.z", kNtidZ},
      {"%ctaid.x", kCtaidX},
      {"%ctaid.y", kCtaidY},
      {"%ctaid.z", kCtaidZ},
      {"%ctaid.w", kZero},
      {"%nctaid.x", kNctaidX},
      {"%nctaid.y", kNctaidY},
      {"%nctaid.z", kNctaidZ},
      {"%laneid", kLaneId},
      {"%warpid", kWarpId},
      {"%nwarpid", kNumWarps},
      {"%smid", kSmId},
      {"%nsmid", kNumSms},
      {"%gridid", kGridId},
      {"%lanemask_eq", kLaneMaskEq},
      {"%lanemask_le", kLaneMaskLe},
      {"%lanemask_lt", kLaneMaskLt},
      {"%lanemask_ge", kLaneMaskGe},
      {"%lanemask_gt", kLaneMaskGt},
      {"%dynamic_smem_size", kDynamicSharedSize},
      {"%total_smem_size", kTotalSharedSize},
      {"%aggr_smem_size", kAggregateSharedSize},
      {"%clusterid.x", kClusterIdX},
      {"%clusterid.y", kClusterIdY},
      {"%clusterid.z", kClusterIdZ},
      {"%nclusterid.x", kNumClustersX},
      {"%nclusterid.y", kNumClustersY},
      {"%nclusterid.z", kNumClustersZ},
      {"%cluster_ctaid.x", kClusterCtaidX},
      {"%cluster_ctaid.y", kClusterCtaidY},
      {"%cluster_ctaid.z", kClusterCtaidZ},
      {"%cluster_nctaid.x", kClusterNctaidX},
      {"%cluster_nctaid.y", kClusterNctaidY},
      {"%cluster_nctaid.z", kClusterNctaidZ},
      {"%cluster_ctarank", kClusterCtaRank},
      {"%cluster_nctarank", kClusterNctaRank},
      {"%is_explicit_cluster", kIsExplicitCluster},
      {"%clock", kClock},
      {"%clock64", kClock64},
      {"%clock_hi", kClockHigh},
      {"%globaltimer", kGlobalTimer},
      {"%globaltimer_lo", kGlobalTimer},
      {"%globaltimer_hi", kGlobalTimerHigh},
  };
  return names;
}

// 0f3f800000 and 0d3ff0000000000000: a number by its bits.
bool is_bits(std::string_view text, char lower, char upper, size_t digits) {
  return text.size() == digits + 2 && text[0] == '0' && (text[1] == lower || text[1] == upper);
}

}  // namespace

int size_of(Type type) {
  return type == Type::kNone ? 0 : kTypes[static_cast<size_t>(type) - 1].bytes;
}

std::string_view name_of(Type type) {
  return type == Type::kNone ? "" : kTypes[static_cast<size_t>(type) - 1].name;
}

Type parse_type(std::string_view modifier) {
  for (const TypeName& entry : kTypes)
    if (entry.name == modifier) return entry.type;
  return Type::kNone;
}

std::optional<SpecialRegister> parse_special_register(std::string_view name) {
  if (const auto found = special_registers().find(name); found != special_registers().end())
    return found->second;
  if (name.starts_with("%envreg") || name.starts_with("%pm")) return SpecialRegister::kZero;
  return std::nullopt;
}

ParsedOperand parse_literal(std::string_view view) {
  const std::string text(view);
  ParsedOperand literal;
  literal.kind = OperandKind::kImmediate;
  if (is_bits(view, 'f', 'F', 8)) {
    literal.is_float = true;
    literal.float_bits = 32;
    literal.integer = std::strtoull(text.c_str() + 2, nullptr, 16);
    literal.real = std::bit_cast<float>(static_cast<uint32_t>(literal.integer));
  } else if (is_bits(view, 'd', 'D', 16)) {
    literal.is_float = true;
    literal.float_bits = 64;
    literal.integer = std::strtoull(text.c_str() + 2, nullptr, 16);
    literal.real = std::bit_cast<double>(literal.integer);
  } else if (view.starts_with("0b") || view.starts_with("0B")) {
    literal.integer = std::strtoull(text.c_str() + 2, nullptr, 2);
  } else if (view.starts_with("0x") || view.starts_with("0X") ||
             view.find_first_of(".eE") == std::string_view::npos) {
    literal.integer = std::strtoull(text.c_str(), nullptr, 0);
  } else {
    literal.is_float = true;
    literal.real = std::strtod(text.c_str(), nullptr);
  }
  return literal;
}

}  // namespace mergeme::ptx
