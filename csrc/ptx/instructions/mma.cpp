// mma.sync: products of fragments that lie in registers, in the layouts of the PTX manual.
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/instructions/matrix.h"

namespace mergeme::ptx {
namespace {

constexpr int kMaxM = 16;
constexpr int kN = 8;
constexpr int kMaxK = 64;

struct Matrices {
  alignas(64) double a[kMaxM * kMaxK];
  alignas(64) double b[kMaxK * kN];
  alignas(64) double c[kMaxM * kN];
};

// Elements of A or B in one register.
int packed_elements(Type type) { return std::max(1, 32 / element_bits(type)); }

// Registers of A cover 8 rows and, with four lanes side by side, four registers' width of columns;
// of a shape with 16 rows they alternate between the upper and the lower half.
void unpack_a(const Warp& warp, const MatrixMultiply& matrix, double* a) {
  const int packed = packed_elements(matrix.a_type);
  const int halves = matrix.m / 8;
  for (int r = 0; r < matrix.num_a; r++) {
    const uint64_t* source = row(warp, matrix.a[r]);
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int m = lane / 4 + 8 * (r % halves);
      const int k = (lane % 4 + r / halves * 4) * packed;
      for (int j = 0; j < packed; j++)
        a[m * matrix.k + k + j] = matrix_element(source[lane], j, matrix.a_type);
    }
  }
}

void unpack_b(const Warp& warp, const MatrixMultiply& matrix, double* b) {
  const int packed = packed_elements(matrix.b_type);
  for (int r = 0; r < matrix.num_b; r++) {
    const uint64_t* source = row(warp, matrix.b[r]);
    for (int lane = 0; lane < kWarpSize; lane++) {
      const int k = (lane % 4 + r * 4) * packed;
      const int n = lane / 4;
      for (int j = 0; j < packed; j++)
        b[(k + j) * kN + n] = matrix_element(source[lane], j, matrix.b_type);
    }
  }
}

// Where accumulator x of a lane belongs.
int accumulator_index(int lane, int x) {
  const int m = lane / 4 + 8 * (x / 2);
  const int n = lane % 4 * 2 + x % 2;
  return m * kN + n;
}

void unpack_c(const Warp& warp, const MatrixMultiply& matrix, double* c) {
  const int packed = matrix.c_type == Type::kF16 ? 2 : 1;
  for (int r = 0; r < matrix.num_c; r++) {
    const uint64_t* source = row(warp, matrix.c[r]);
    for (int lane = 0; lane < kWarpSize; lane++)
      for (int j = 0; j < packed; j++)
        c[accumulator_index(lane, r * packed + j)] =
            accumulator_element(source[lane], j, matrix.c_type);
  }
}

void pack_d(const Warp& warp, const MatrixMultiply& matrix, const double* c) {
  const int packed = matrix.d_type == Type::kF16 ? 2 : 1;
  for (int r = 0; r < matrix.num_d; r++) {
    uint64_t* d = result_row(warp, matrix.d[r]);
    for (int lane = 0; lane < kWarpSize; lane++) {
      uint64_t bits = 0;
      for (int j = 0; j < packed; j++) {
        const double sum = c[accumulator_index(lane, r * packed + j)];
        bits |= encode_accumulator(sum, matrix.d_type, matrix.satfinite) << (16 * j);
      }
      d[lane] = bits;
    }
  }
}

void mma(Warp& warp, const Instruction& instruction, uint32_t) {
  const MatrixMultiply& matrix = *instruction.matrix;
  Matrices matrices;
  unpack_a(warp, matrix, matrices.a);
  unpack_b(warp, matrix, matrices.b);
  unpack_c(warp, matrix, matrices.c);
  multiply_add(matrices.c, matrices.a, matrices.b, matrix.m, kN, matrix.k);
  pack_d(warp, matrix, matrices.c);
}

// The shapes of kernels, m16n8k8 and m16n8k16 of 16-bit elements with f32 accumulators, with
// everything about them known to the compiler.
template <Type kType, int kK>
void mma_16_bit(Warp& warp, const Instruction& instruction, uint32_t) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const auto low = [](uint64_t bits) -> double {
    return kType == Type::kBF16 ? bfloat16_to_float(static_cast<uint16_t>(bits))
                                : half_to_float(static_cast<uint16_t>(bits));
  };
  Matrices matrices;
  for (int r = 0; r < kK / 4; r++) {
    const uint64_t* source = row(warp, matrix.a[r]);
    for (int lane = 0; lane < kWarpSize; lane++) {
      double* to = &matrices.a[(lane / 4 + 8 * (r % 2)) * kK + lane % 4 * 2 + r / 2 * 8];
      to[0] = low(source[lane]);
      to[1] = low(source[lane] >> 16);
    }
  }
  for (int r = 0; r < kK / 8; r++) {
    const uint64_t* source = row(warp, matrix.b[r]);
    for (int lane = 0; lane < kWarpSize; lane++) {
      double* to = &matrices.b[(lane % 4 * 2 + r * 8) * kN + lane / 4];
      to[0] = low(source[lane]);
      to[kN] = low(source[lane] >> 16);
    }
  }
  for (int r = 0; r < 4; r++) {
    const uint64_t* source = row(warp, matrix.c[r]);
    for (int lane = 0; lane < kWarpSize; lane++)
      matrices.c[accumulator_index(lane, r)] = from_register<float>(source[lane]);
  }
  multiply_add(matrices.c, matrices.a, matrices.b, 16, kN, kK);
  for (int r = 0; r < 4; r++) {
    uint64_t* d = result_row(warp, matrix.d[r]);
    for (int lane = 0; lane < kWarpSize; lane++)
      d[lane] = canonical(static_cast<float>(matrices.c[accumulator_index(lane, r)]));
  }
}

Handler quick_handler(const MatrixMultiply& matrix) {
  const bool f32 = matrix.c_type == Type::kF32 && matrix.d_type == Type::kF32;
  if (matrix.m != 16 || !f32 || matrix.a_type != matrix.b_type) return nullptr;
  if (matrix.a_type == Type::kBF16)
    return matrix.k == 16 ? mma_16_bit<Type::kBF16, 16> : mma_16_bit<Type::kBF16, 8>;
  if (matrix.a_type == Type::kF16)
    return matrix.k == 16 ? mma_16_bit<Type::kF16, 16> : mma_16_bit<Type::kF16, 8>;
  return nullptr;
}

bool is_known(const MatrixMultiply& matrix) {
  if (matrix.n != kN || matrix.k > kMaxK || matrix.a_type == Type::kB1) return false;
  const bool integers = matrix.c_type == Type::kS32;
  const bool fits = matrix.m == 16 || (matrix.m == 8 && (integers || matrix.a_type == Type::kF64));
  const int a_lanes = kWarpSize * packed_elements(matrix.a_type);
  const int b_lanes = kWarpSize * packed_elements(matrix.b_type);
  return fits && matrix.num_a * a_lanes == matrix.m * matrix.k &&
         matrix.num_b * b_lanes == matrix.n * matrix.k;
}

// The registers of an operand, which is a vector or a single register.
bool take_registers(const Instruction& i, int operand, std::array<Operand, 16>& registers,
                    int& count) {
  const Operand& source = i.operands[operand];
  count = source.kind == OperandKind::kVector ? source.count : 1;
  if (count > static_cast<int>(registers.size())) return false;
  for (int k = 0; k < count; k++) registers[k] = element(i, source, k);
  return true;
}

}  // namespace

bool decode_mma(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode != "mma" || parsed.operands.size() < 4) return false;
  // Sparse and block-scaled products.
  if (parsed.has("sp") || parsed.has_prefix("sp::") || parsed.has_prefix("kind::")) return false;
  auto matrix = std::make_unique<MatrixMultiply>();
  if (!decode_shape(parsed, *matrix)) return false;
  const bool taken = take_registers(i, 0, matrix->d, matrix->num_d) &&
                     take_registers(i, 1, matrix->a, matrix->num_a) &&
                     take_registers(i, 2, matrix->b, matrix->num_b) &&
                     take_registers(i, 3, matrix->c, matrix->num_c);
  if (!taken || !is_known(*matrix)) return false;
  const Handler quick = quick_handler(*matrix);
  i.execute = quick ? quick : mma;
  i.matrix = std::move(matrix);
  i.control = Control::kWarpSync;
  i.aligned = true;
  return true;
}

}  // namespace mergeme::ptx
