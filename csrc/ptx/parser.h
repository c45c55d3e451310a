// What is left of a PTX file when its text has been read: variables, functions, instructions.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace mergeme::ptx {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The fundamental and packed types of the manual, named as their suffixes (.f16x2 is kF16x2).
enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBF16,
  kBF16x2,
  kF32,
  kF64,
  kTF32,
  kE4M3,
  kE5M2,
  kE4M3x2,
  kE5M2x2,
  kU16x2,
  kS16x2,
  kF32x2,
  kUE8M0x2,
  kS4,
  kU4,
  kB1
};
int size_of(Type type);                      // in bytes; types under a byte count as one
Type parse_type(std::string_view modifier);  // kNone if it names no type
inline bool is_floating(Type t) { return t >= Type::kF16 && t <= Type::kE5M2x2; }
inline bool is_signed(Type t) { return t >= Type::kS8 && t <= Type::kS64; }

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };

// A register that the hardware fills: %tid.x and the like. From kClock on they change while a
// kernel runs; the others are rows of constants, laid out when a block starts.
enum class SpecialRegister : int {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNumWarps,
  kSmId,
  kNumSms,
  kGridId,
  kLaneMaskEq,
  kLaneMaskLe,
  kLaneMaskLt,
  kLaneMaskGe,
  kLaneMaskGt,
  kDynamicSharedSize,
  kTotalSharedSize,
  kClusterIdX,
  kClusterIdY,
  kClusterIdZ,
  kNumClustersX,
  kNumClustersY,
  kNumClustersZ,
  kClusterCtaidX,
  kClusterCtaidY,
  kClusterCtaidZ,
  kClusterNctaidX,
  kClusterNctaidY,
  kClusterNctaidZ,
  kClusterCtaRank,
  kClusterNctaRank,
  kIsExplicitCluster,
  kAggregateSharedSize,
  kZero,  // those that read as zero
  kClock,
  kClock64,
  kClockHigh,
  kGlobalTimer,
  kGlobalTimerHigh,
  kCount
};

// A variable of the module or of a function.
struct Symbol {
  // An address in an initialiser, filled in when everything has its place.
  struct Relocation {
    uint64_t offset;
    std::string symbol;
    int64_t addend;
  };
  std::string name;
  Space space = Space::kGlobal;
  Type type = Type::kB8;
  int alignment = 1;
  uint64_t size = 0;
  bool is_extern = false;
  std::vector<uint8_t> initial;
  std::vector<Relocation> relocations;
  uint64_t address = 0;  // of the host for .global and .const, else an offset in its space
  bool placed = false;
};

enum class OperandKind : uint8_t {
  kNone,
  kRegister,
  kPredicate,
  kImmediate,
  kSymbol,
  kVector,   // {a, b, ...}
  kAddress,  // [a + offset, ...]
  kSink,     // _
  kSpecialRegister,
  kName  // a label or a function
};

struct ParsedOperand {
  OperandKind kind = OperandKind::kNone;
  bool negated = false;
  int index = -1;  // of a register, predicate or special register
  bool is_float = false;
  int float_bits = 0;  // 32 or 64 if written as bits (0f..., 0d...), else 0
  uint64_t integer = 0;
  double real = 0;
  int64_t offset = 0;
  std::string name;
  Symbol* symbol = nullptr;
  std::vector<ParsedOperand> elements;  // of a vector; of an address: its base, then what follows
};

struct ParsedInstruction {
  std::string mnemonic;                // "ld.global.f32"
  std::string opcode;                  // "ld"
  std::vector<std::string> modifiers;  // "global", "f32"
  std::string text;                    // for messages
  std::vector<ParsedOperand> operands;
  bool has_second_output = false;  // setp d|q, shfl d|p
  ParsedOperand second_output;
  bool has_guard = false;
  bool guard_negated = false;
  int guard = -1;
  int line = 0;
  int source_file = 0;
  int source_line = 0;
  int scope = 0;  // where its labels are looked up
  std::vector<ParsedOperand> call_arguments;
  std::vector<ParsedOperand> call_results;

  bool has(std::string_view modifier) const {
    for (const std::string& m : modifiers)
      if (m == modifier) return true;
    return false;
  }
  bool has_prefix(std::string_view prefix) const {
    for (const std::string& m : modifiers)
      if (m.starts_with(prefix)) return true;
    return false;
  }
  // The types among the modifiers, in order: cvt.rn.f32.s32 has two.
  std::vector<Type> types() const {
    std::vector<Type> found;
    for (const std::string& m : modifiers)
      if (const Type type = parse_type(m); type != Type::kNone) found.push_back(type);
    return found;
  }
};

struct FunctionParameter {
  std::string name;
  Type type;
  int size;
  int alignment;
  int offset;
};

struct ParsedFunction {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<FunctionParameter> parameters;
  std::vector<FunctionParameter> results;
  int parameter_bytes = 0;
  int result_bytes = 0;
  std::vector<ParsedInstruction> parsed;
  int num_predicates = 0;
  std::vector<int> register_widths;   // bytes of each register row; .b128 takes two rows of eight
  std::map<std::string, int> labels;  // "name@scope" to the instruction that follows it
  std::vector<int> parent_scopes;
  std::map<std::string, std::vector<std::string>> branch_targets;
  std::vector<std::unique_ptr<Symbol>> variables;  // declared in the function
  uint64_t local_bytes = 0;
  uint64_t param_bytes = 0;  // parameters, results and .param variables of calls
  std::array<int, 3> required_threads{};
  std::array<int, 3> max_threads{};

  // The instruction that a label seen from a scope names, or -1.
  int find_label(const std::string& label, int scope) const;
};

struct Function;  // machine.h: a parsed function and what decoding makes of it

struct ParsedModule {
  std::map<std::string, std::unique_ptr<Symbol>> symbols;
  std::vector<Symbol*> symbols_in_order;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<int, std::string> files;
};

// Throws Error, naming the line, where the text cannot be read.
void parse(const std::string& text, ParsedModule& module);

}  // namespace mergeme::ptx
