// wgmma: products of a warpgroup, m64nNkK, whose operands lie in shared memory or, of A, in
// registers. Each warp computes its 16 rows when it issues the instruction; the accumulators hold
// poison until a wait_group covers it, and the operands may not change before.
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/instructions/matrix.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr int kM = 64;
constexpr int kMaxN = 256;
constexpr int kWarpRows = 16;
constexpr int kWarpsPerGroup = 4;
constexpr int kUnit = 16;        // bytes that lie side by side in every layout
constexpr int kDepthBytes = 32;  // of one instruction along K, whatever the type
constexpr size_t kRowBytes = kWarpSize * sizeof(uint64_t);

// Operands: D, A, B, scale-d, scale-a, scale-b.
constexpr int kOperandD = 0;
constexpr int kOperandA = 1;
constexpr int kOperandB = 2;
constexpr int kScaleD = 3;
constexpr int kScaleA = 4;
constexpr int kScaleB = 5;

// ---- matrices in shared memory

// The fields of a matrix descriptor, in bytes. Swizzling is by rows of 128, 64 or 32 bytes.
struct Descriptor {
  uint32_t start;
  uint32_t leading;  // between core matrices along K; of a swizzled MN-major matrix along MN
  uint32_t stride;
  int swizzle;

  explicit Descriptor(uint64_t bits)
      : start(field(bits, 0)),
        leading(field(bits, 16)),
        stride(field(bits, 32)),
        swizzle(static_cast<int>(bits >> 62)) {}

  static uint32_t field(uint64_t bits, int shift) {
    return static_cast<uint32_t>((bits >> shift) & 0x3fff) << 4;
  }
  // Units in a row of the swizzle: 1 where there is none.
  int units() const { return swizzle == 0 ? 1 : 16 >> swizzle; }
  uint32_t swizzled(uint32_t address) const {
    if (swizzle == 0) return address;
    return address ^ ((address >> 3) & static_cast<uint32_t>((units() - 1) << 4));
  }
};

// The shared address of a unit of a K-major matrix: row mn, unit u along K. Eight rows are a core
// matrix; `stride` lies between those.
uint32_t k_major_unit(const Descriptor& d, int mn, int u) {
  const uint32_t rows =
      static_cast<uint32_t>(mn % 8 * kUnit * d.units()) + static_cast<uint32_t>(mn / 8) * d.stride;
  const uint32_t along_k =
      d.swizzle == 0 ? static_cast<uint32_t>(u) * d.leading : static_cast<uint32_t>(u * kUnit);
  return d.swizzled(d.start + rows + along_k);
}

// Of an MN-major matrix: unit u along MN, at k.
uint32_t mn_major_unit(const Descriptor& d, int u, int k) {
  const int units = d.units();
  const auto in_core = static_cast<uint32_t>(u % units * kUnit + k % 8 * kUnit * units);
  const auto along_mn = static_cast<uint32_t>(u / units);
  const auto along_k = static_cast<uint32_t>(k / 8);
  const uint32_t cores = d.swizzle == 0 ? along_mn * d.stride + along_k * d.leading
                                        : along_mn * d.leading + along_k * d.stride;
  return d.swizzled(d.start + in_core + cores);
}

// ---- digests of what is in flight

constexpr uint64_t kDigestStart = 1469598103934665603u;

uint64_t digest_words(uint64_t digest, const void* memory, size_t bytes) {
  const auto* from = static_cast<const uint8_t*>(memory);
  for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, from + at, sizeof word);
    digest = (digest ^ word) * 1099511628211u;
    digest ^= digest >> 29;
  }
  return digest;
}

uint64_t digest_of(const WgmmaRecord& record, const Block& block) {
  uint64_t digest = kDigestStart;
  for (const uint32_t offset : record.offsets)
    digest = digest_words(digest, block.shared + offset, kUnit);
  for (const uint64_t* registers : record.registers)
    digest = digest_words(digest, registers, kRowBytes);
  return digest;
}

// ---- operands

// The 16 bytes at a shared address, which the wgmma reads through the async proxy.
const uint8_t* read_unit(Warp& warp, const Instruction& instruction, uint32_t address,
                         WgmmaRecord& record) {
  const Block& block = *warp.block;
  const uint32_t offset = address - static_cast<uint32_t>(kSharedBase);
  if (address < kSharedBase || uint64_t{offset} + kUnit > block.shared_bytes)
    warp.fail(instruction, -1,
              concat("wgmma descriptor reaches outside shared memory (offset ",
                     int64_t{address} - static_cast<int64_t>(kSharedBase), ")"));
  check_async_read(warp, instruction, -1, block, offset, kUnit);
  record.offsets.push_back(offset);
  return block.shared + offset;
}

const std::array<double, 256>& eight_bit_values(Type type) {
  const auto make = [](Type t) {
    std::array<double, 256> values;
    for (int bits = 0; bits < 256; bits++) values[bits] = matrix_element(bits, 0, t);
    return values;
  };
  static const auto e4m3 = make(Type::kE4M3);
  static const auto e5m2 = make(Type::kE5M2);
  static const auto s8 = make(Type::kS8);
  static const auto u8 = make(Type::kU8);
  switch (type) {
    case Type::kE4M3:
      return e4m3;
    case Type::kE5M2:
      return e5m2;
    case Type::kS8:
      return s8;
    default:
      return u8;
  }
}

// Stores the elements of a unit at to[0], to[step], ...
void unpack_unit(const uint8_t* unit, Type type, double* to, int step) {
  const int bits = element_bits(type);
  if (bits == 8) {
    const std::array<double, 256>& values = eight_bit_values(type);
    for (int j = 0; j < kUnit; j++) to[j * step] = values[unit[j]];
  } else if (bits == 16) {
    uint16_t halves[kUnit / 2];
    std::memcpy(halves, unit, kUnit);
    if (type == Type::kBF16)
      for (int j = 0; j < kUnit / 2; j++) to[j * step] = bfloat16_to_float(halves[j]);
    else
      for (int j = 0; j < kUnit / 2; j++) to[j * step] = half_to_float(halves[j]);
  } else {
    uint32_t words[kUnit / 4];
    std::memcpy(words, unit, kUnit);
    for (int j = 0; j < kUnit / 4; j++) to[j * step] = matrix_element(words[j], 0, type);
  }
}

// Rows [first, first + count) of a matrix in shared memory. Element (mn, k) goes to
// to[(mn - first) * mn_step + k * k_step].
void load_matrix(Warp& warp, const Instruction& instruction, uint64_t descriptor_bits, Type type,
                 bool mn_major, int first, int count, double* to, int mn_step, int k_step,
                 WgmmaRecord& record) {
  const Descriptor descriptor(descriptor_bits);
  const int per_unit = kUnit * 8 / element_bits(type);
  const int depth = instruction.matrix->k;
  if (mn_major) {
    for (int k = 0; k < depth; k++)
      for (int mn = 0; mn < count; mn += per_unit) {
        const uint32_t address = mn_major_unit(descriptor, (first + mn) / per_unit, k);
        const uint8_t* unit = read_unit(warp, instruction, address, record);
        unpack_unit(unit, type, to + mn * mn_step + k * k_step, mn_step);
      }
    return;
  }
  for (int mn = 0; mn < count; mn++)
    for (int u = 0; u < kDepthBytes / kUnit; u++) {
      const uint32_t address = k_major_unit(descriptor, first + mn, u);
      const uint8_t* unit = read_unit(warp, instruction, address, record);
      unpack_unit(unit, type, to + mn * mn_step + u * per_unit * k_step, k_step);
    }
}

// A in four registers, laid out as mma's m16.
void load_a_registers(const Warp& warp, const Instruction& instruction, double* a,
                      WgmmaRecord& record) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const int packed = 32 / element_bits(matrix.a_type);
  for (int r = 0; r < 4; r++) {
    const uint64_t* source = row(warp, element(instruction, instruction.operands[kOperandA], r));
    record.registers.push_back(source);
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int m = lane / 4 + 8 * (r % 2);
      const int k = (lane % 4 + r / 2 * 4) * packed;
      for (int j = 0; j < packed; j++)
        a[m * matrix.k + k + j] = matrix_element(source[lane], j, matrix.a_type);
    }
  }
}

// ---- accumulators

// Where accumulator x of a lane belongs among a warp's rows.
int accumulator_index(int lane, int x, int n) {
  const int m = lane / 4 + 8 * (x / 2 % 2);
  const int column = x / 4 * 8 + lane % 4 * 2 + x % 2;
  return m * n + column;
}

// A register is read by a wgmma in flight, or was not touched since the last wgmma.fence.
void check_register(Warp& warp, const Instruction& instruction, const uint64_t* registers) {
  const Function& function = *warp.frames.back()->function;
  const auto row_number = static_cast<size_t>(registers - warp.registers) / kWarpSize;
  const uint64_t* fenced =
      warp.fenced_registers.data() + function.wgmma_places[row_number] * kWarpSize;
  if (std::memcmp(registers, fenced, kRowBytes) != 0)
    warp.fail(instruction, -1,
              "missing wgmma.fence: a register of this wgmma was accessed since the last one");
}

void check_registers(Warp& warp, const Instruction& instruction) {
  if (warp.fenced_registers.empty())
    warp.fail(instruction, -1, "missing wgmma.fence: there was none before the first wgmma");
  const Operand& d = instruction.operands[kOperandD];
  for (int r = 0; r < d.count; r++) {
    uint64_t* registers = result_row(warp, element(instruction, d, r));
    const auto pending = warp.pending_accumulators.find(registers);
    if (pending == warp.pending_accumulators.end()) {
      check_register(warp, instruction, registers);
      continue;
    }
    // Accumulators in flight need no fence if the shape is the same.
    const MatrixMultiply& before = *pending->second.instruction->matrix;
    if (before.n != instruction.matrix->n || before.d_type != instruction.matrix->d_type)
      warp.fail(instruction, -1,
                "accumulators of a wgmma of another shape in flight, which was not waited for");
    for (int lane = 0; lane < kWarpSize; lane++)
      if (registers[lane] != kPoison)
        warp.fail(instruction, lane, "an accumulator was changed while its wgmma was in flight");
  }
  const Operand& a = instruction.operands[kOperandA];
  if (a.kind != OperandKind::kVector) return;
  for (int r = 0; r < a.count; r++)
    check_register(warp, instruction, result_row(warp, element(instruction, a, r)));
}

void load_accumulators(const Warp& warp, const Instruction& instruction, bool scale_d, double* c) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const Operand& d = instruction.operands[kOperandD];
  const int packed = matrix.d_type == Type::kF16 ? 2 : 1;
  if (!scale_d) {
    std::fill_n(c, kWarpRows * matrix.n, 0.0);
    return;
  }
  for (int r = 0; r < d.count; r++) {
    uint64_t* registers = result_row(warp, element(instruction, d, r));
    const auto pending = warp.pending_accumulators.find(registers);
    const uint64_t* values =
        pending == warp.pending_accumulators.end() ? registers : pending->second.values.data();
    for (int lane = 0; lane < kWarpSize; lane++)
      for (int j = 0; j < packed; j++)
        c[accumulator_index(lane, r * packed + j, matrix.n)] =
            accumulator_element(values[lane], j, matrix.d_type);
  }
}

void hold_accumulators(Warp& warp, const Instruction& instruction, const double* c) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const Operand& d = instruction.operands[kOperandD];
  const int packed = matrix.d_type == Type::kF16 ? 2 : 1;
  for (int r = 0; r < d.count; r++) {
    uint64_t* registers = result_row(warp, element(instruction, d, r));
    PendingAccumulator& pending = warp.pending_accumulators[registers];
    pending.group = warp.wgmma_group;
    pending.instruction = &instruction;
    for (int lane = 0; lane < kWarpSize; lane++) {
      uint64_t bits = 0;
      for (int j = 0; j < packed; j++) {
        const double sum = c[accumulator_index(lane, r * packed + j, matrix.n)];
        bits |= encode_accumulator(sum, matrix.d_type, matrix.satfinite) << (16 * j);
      }
      pending.values[lane] = bits;
      registers[lane] = kPoison;
    }
  }
}

// ---- instructions

void mma_async(Warp& warp, const Instruction& instruction, uint32_t) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const auto value = [&](int k) { return row(warp, instruction.operands[k])[0]; };
  check_registers(warp, instruction);
  WgmmaRecord record{.digest = 0, .offsets = {}, .registers = {}, .instruction = &instruction};
  static thread_local std::vector<double> a, b, c;
  a.resize(kWarpRows * matrix.k);
  b.resize(matrix.k * matrix.n);
  c.resize(kWarpRows * matrix.n);
  if (instruction.operands[kOperandA].kind == OperandKind::kVector)
    load_a_registers(warp, instruction, a.data(), record);
  else
    load_matrix(warp, instruction, value(kOperandA), matrix.a_type, matrix.transposed_a,
                warp.id % kWarpsPerGroup * kWarpRows, kWarpRows, a.data(), matrix.k, 1, record);
  load_matrix(warp, instruction, value(kOperandB), matrix.b_type, matrix.transposed_b, 0, matrix.n,
              b.data(), 1, matrix.n, record);
  const bool scale_d = true_lanes(warp, instruction.operands[kScaleD], 1) != 0;
  load_accumulators(warp, instruction, scale_d, c.data());
  if (instruction.num_operands > kScaleB) {
    const int sign = static_cast<int32_t>(value(kScaleA)) * static_cast<int32_t>(value(kScaleB));
    if (sign < 0)
      for (double& x : a) x = -x;
  }
  multiply_add(c.data(), a.data(), b.data(), kWarpRows, matrix.n, matrix.k);
  hold_accumulators(warp, instruction, c.data());
  record.digest = digest_of(record, *warp.block);
  warp.open_wgmmas.push_back(std::move(record));
}

// The rows that wgmmas of a function work on, found when its first fence is executed.
void find_wgmma_rows(Function& function) {
  function.wgmma_places.assign(static_cast<size_t>(function.num_registers()) + 4, -1);
  const auto add = [&](const Instruction& instruction, const Operand& operand) {
    for (int k = 0; operand.kind == OperandKind::kVector && k < operand.count; k++) {
      const int index = element(instruction, operand, k).index;
      if (function.wgmma_places[index] >= 0) continue;
      function.wgmma_places[index] = static_cast<int>(function.wgmma_rows.size());
      function.wgmma_rows.push_back(index);
    }
  };
  for (const Instruction& instruction : function.code) {
    if (instruction.execute != mma_async) continue;
    add(instruction, instruction.operands[kOperandD]);
    add(instruction, instruction.operands[kOperandA]);
  }
}

// Orders accesses to registers before wgmmas that follow: we keep what the registers hold now, and
// whoever changes one of them needs another fence.
void fence(Warp& warp, const Instruction&, uint32_t) {
  Function& function = *warp.frames.back()->function;
  if (function.wgmma_rows.empty()) find_wgmma_rows(function);
  warp.fenced_registers.resize(std::max<size_t>(1, function.wgmma_rows.size()) * kWarpSize);
  for (size_t k = 0; k < function.wgmma_rows.size(); k++)
    std::memcpy(&warp.fenced_registers[k * kWarpSize],
                warp.registers + static_cast<size_t>(function.wgmma_rows[k]) * kWarpSize,
                kRowBytes);
}

void commit_group(Warp& warp, const Instruction&, uint32_t) {
  warp.wgmma_groups.push_back(std::move(warp.open_wgmmas));
  warp.open_wgmmas.clear();
  warp.wgmma_group++;
  warp.launch->progress++;
}

// Groups below `upto` have read their operands; those must be as they were.
void check_operands(Warp& warp, uint64_t upto, int wait_line) {
  const uint64_t first = warp.wgmma_group - warp.wgmma_groups.size();
  for (size_t k = 0; k < warp.wgmma_groups.size() && first + k < upto; k++) {
    for (const WgmmaRecord& record : warp.wgmma_groups[k])
      if (digest_of(record, *warp.block) != record.digest)
        warp.fail(*record.instruction, -1,
                  concat("an operand of this wgmma in shared memory or registers was modified "
                         "before it was waited for (wait at PTX line ",
                         wait_line, ")"));
    warp.wgmma_groups[k].clear();
  }
}

// Gives accumulators back. They need a wgmma.fence before the next wgmma.
void release_accumulators(Warp& warp, uint64_t below_group) {
  const Function& function = *warp.frames.back()->function;
  for (auto it = warp.pending_accumulators.begin(); it != warp.pending_accumulators.end();) {
    const auto& [registers, pending] = *it;
    if (pending.group >= below_group) {
      ++it;
      continue;
    }
    std::memcpy(registers, pending.values.data(), kRowBytes);
    const auto row_number = static_cast<size_t>(registers - warp.registers) / kWarpSize;
    if (row_number < function.wgmma_places.size() && function.wgmma_places[row_number] >= 0)
      warp.fenced_registers[function.wgmma_places[row_number] * kWarpSize] = ~registers[0];
    it = warp.pending_accumulators.erase(it);
  }
}

// What is complete for one warp is complete for the group: the operands of all four are checked,
// and may change from here on.
void wait_group(Warp& warp, const Instruction& instruction, uint32_t) {
  const auto allowed = static_cast<uint64_t>(instruction.immediate);
  const uint64_t upto = warp.wgmma_group > allowed ? warp.wgmma_group - allowed : 0;
  for (const auto& other : warp.block->warps)
    if (other->id / kWarpsPerGroup == warp.id / kWarpsPerGroup)
      check_operands(*other, upto, instruction.source->line);
  auto& groups = warp.wgmma_groups;
  if (groups.size() > allowed)
    groups.erase(groups.begin(), groups.end() - static_cast<int64_t>(allowed));
  release_accumulators(warp, warp.wgmma_group - groups.size());
}

bool is_known(const MatrixMultiply& matrix) {
  const Type a = matrix.a_type;
  const Type b = matrix.b_type;
  const bool fp8 = (a == Type::kE4M3 || a == Type::kE5M2) && (b == Type::kE4M3 || b == Type::kE5M2);
  const bool integers = (a == Type::kS8 || a == Type::kU8) && (b == Type::kS8 || b == Type::kU8);
  const bool halves = a == b && (a == Type::kF16 || a == Type::kBF16);
  const bool tf32 = a == b && a == Type::kTF32;
  if (!fp8 && !integers && !halves && !tf32) return false;
  const bool accumulates = integers ? matrix.d_type == Type::kS32
                                    : matrix.d_type == Type::kF32 ||
                                          (matrix.d_type == Type::kF16 && (fp8 || a == Type::kF16));
  const bool major_fits = halves || (!matrix.transposed_a && !matrix.transposed_b);
  return accumulates && major_fits && matrix.m == kM && matrix.n % 8 == 0 && matrix.n >= 8 &&
         matrix.n <= kMaxN && matrix.k * element_bits(a) == kDepthBytes * 8;
}

// Behind the scales, which integers do not have, the majors: of A and B, or of B alone if A lies in
// registers.
bool decode_majors(const ParsedInstruction& parsed, bool a_in_registers, MatrixMultiply& matrix) {
  constexpr size_t kFirst = 6;
  const size_t majors = parsed.operands.size() > kFirst ? parsed.operands.size() - kFirst : 0;
  if (majors == 0) return true;
  if (majors != (a_in_registers ? 1 : 2)) return false;
  if (!a_in_registers) matrix.transposed_a = parsed.operands[kFirst].integer != 0;
  matrix.transposed_b = parsed.operands.back().integer != 0;
  return true;
}

bool decode_mma_async(const ParsedInstruction& parsed, Instruction& i) {
  auto matrix = std::make_unique<MatrixMultiply>();
  if (parsed.has("sp") || !decode_shape(parsed, *matrix)) return false;
  const bool integers = matrix->d_type == Type::kS32;
  const bool a_in_registers = i.operands[kOperandA].kind == OperandKind::kVector;
  const Operand& d = i.operands[kOperandD];
  if (parsed.operands.size() < (integers ? 4 : 6) || d.kind != OperandKind::kVector) return false;
  if (!decode_majors(parsed, a_in_registers, *matrix) || !is_known(*matrix)) return false;
  const int packed = matrix->d_type == Type::kF16 ? 2 : 1;
  if (d.count * packed != matrix->n / 2) return false;
  if (a_in_registers && i.operands[kOperandA].count != 4) return false;
  i.matrix = std::move(matrix);
  i.execute = mma_async;
  return true;
}

}  // namespace

bool decode_wgmma(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode != "wgmma") return false;
  if (parsed.has("mma_async")) {
    if (!decode_mma_async(parsed, i)) return false;
  } else if (parsed.has("fence")) {
    i.execute = fence;
  } else if (parsed.has("commit_group")) {
    i.execute = commit_group;
  } else if (parsed.has("wait_group")) {
    i.immediate = static_cast<int>(parsed.operands[0].integer);
    i.execute = wait_group;
  } else {
    return false;
  }
  i.control = parsed.has("wait_group") ? Control::kWgmmaWait : Control::kWarpSync;
  i.aligned = true;
  return true;
}

}  // namespace mergeme::ptx
