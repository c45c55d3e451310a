#include "csrc/ptx/instructions/matrix.h"

#include <cstdio>
#include <limits>

namespace mergeme::ptx {
namespace {

constexpr int kColumns = 8;
constexpr int kRows = 4;
typedef double Eight __attribute__((vector_size(kColumns * sizeof(double))));

}  // namespace

int element_bits(Type type) {
  switch (type) {
    case Type::kB1:
      return 1;
    case Type::kS4:
    case Type::kU4:
      return 4;
    case Type::kF16:
    case Type::kBF16:
      return 16;
    case Type::kTF32:
    case Type::kF32:
      return 32;
    case Type::kF64:
      return 64;
    default:
      return 8;
  }
}

double matrix_element(uint64_t bits, int k, Type type) {
  constexpr uint32_t kTF32Bits = 0xffffe000;
  switch (type) {
    case Type::kTF32:
      return from_register<float>(bits & kTF32Bits);
    case Type::kF64:
      return from_register<double>(bits);
    case Type::kS8:
      return static_cast<int8_t>(bits >> (8 * k));
    case Type::kU8:
      return static_cast<uint8_t>(bits >> (8 * k));
    case Type::kU4:
      return static_cast<double>((bits >> (4 * k)) & 15);
    case Type::kS4:
      return static_cast<double>(static_cast<int>((bits >> (4 * k)) & 15) ^ 8) - 8;
    case Type::kF16:
      return half_to_float(static_cast<uint16_t>(bits >> (16 * k)));
    case Type::kBF16:
      return bfloat16_to_float(static_cast<uint16_t>(bits >> (16 * k)));
    default:
      return decode_float(bits >> (8 * k), type);
  }
}

double accumulator_element(uint64_t bits, int k, Type type) {
  switch (type) {
    case Type::kF16:
      return half_to_float(static_cast<uint16_t>(bits >> (16 * k)));
    case Type::kF64:
      return from_register<double>(bits);
    case Type::kS32:
      return from_register<int32_t>(bits);
    default:
      return from_register<float>(bits);
  }
}

// Sums of 32-bit integers are exact in double; without .satfinite they wrap.
uint64_t encode_accumulator(double sum, Type type, bool satfinite) {
  switch (type) {
    case Type::kF16:
      return encode_float(sum, Type::kF16, Rounding::kRn, false);
    case Type::kF64:
      return to_register(sum);
    case Type::kS32: {
      auto integer = static_cast<int64_t>(sum);
      if (satfinite)
        integer = std::clamp<int64_t>(integer, std::numeric_limits<int32_t>::min(),
                                      std::numeric_limits<int32_t>::max());
      return static_cast<uint32_t>(integer);
    }
    default:
      return canonical(static_cast<float>(sum));
  }
}

// Four rows by eight columns stay in registers while k runs.
[[gnu::target_clones("avx512f", "avx2", "default")]] void multiply_add(double* c, const double* a,
                                                                       const double* b, int m,
                                                                       int n, int k) {
  for (int column = 0; column < n; column += kColumns) {
    for (int first = 0; first < m; first += kRows) {
      Eight sums[kRows];
      for (int r = 0; r < kRows; r++)
        std::memcpy(&sums[r], c + (first + r) * n + column, sizeof(Eight));
      for (int depth = 0; depth < k; depth++) {
        Eight values;
        std::memcpy(&values, b + depth * n + column, sizeof(Eight));
        for (int r = 0; r < kRows; r++) sums[r] += values * a[(first + r) * k + depth];
      }
      for (int r = 0; r < kRows; r++)
        std::memcpy(c + (first + r) * n + column, &sums[r], sizeof(Eight));
    }
  }
}

bool decode_shape(const ParsedInstruction& parsed, MatrixMultiply& matrix) {
  bool found = false;
  for (const std::string& modifier : parsed.modifiers)
    found |= std::sscanf(modifier.c_str(), "m%dn%dk%d", &matrix.m, &matrix.n, &matrix.k) == 3;
  const std::vector<Type> types = parsed.types();
  if (!found || types.size() < 3 || types.size() > 4) return false;
  matrix.d_type = types[0];
  matrix.a_type = types[1];
  matrix.b_type = types[2];
  matrix.c_type = types.size() == 4 ? types[3] : types[0];
  matrix.satfinite = parsed.has("satfinite");
  return true;
}

}  // namespace mergeme::ptx
