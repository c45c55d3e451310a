// wmma: fragments whose layout is the machine's own affair, so that ours is simple: element e of a
// matrix, row by row, lies in lane e / P, place e % P, where P elements fit a lane. What is left of
// the lanes holds copies.
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"
#include "csrc/ptx/instructions/matrix.h"

namespace mergeme::ptx {
namespace {

struct Fragment {
  const Operand* operand;
  Type type;
  int elements;  // of the matrix
};

int packed_elements(Type type) {
  if (type == Type::kF16 || type == Type::kBF16) return 2;
  return type == Type::kS8 || type == Type::kU8 ? 4 : 1;
}
int element_bytes(Type type) { return type == Type::kF64 ? 8 : 4 / packed_elements(type); }

uint64_t get(const Warp& warp, const Instruction& instruction, const Fragment& fragment, int e) {
  const int packed = packed_elements(fragment.type);
  const int per_lane = fragment.operand->count * packed;
  const int place = e % per_lane;
  const Operand& source = element(instruction, *fragment.operand, place / packed);
  const uint64_t bits = row(warp, source)[e / per_lane];
  if (packed == 1) return bits;
  const int width = 32 / packed;
  return (bits >> (width * (place % packed))) & ((uint64_t{1} << width) - 1);
}

void put(Warp& warp, const Instruction& instruction, const Fragment& fragment, int e,
         uint64_t value) {
  const int packed = packed_elements(fragment.type);
  const int per_lane = fragment.operand->count * packed;
  const int lanes = fragment.elements / per_lane;
  const int place = e % per_lane;
  const Operand& target = element(instruction, *fragment.operand, place / packed);
  for (int lane = e / per_lane; lane < kWarpSize; lane += lanes) {
    uint64_t& bits = result_row(warp, target)[lane];
    if (packed == 1) {
      bits = value;
      continue;
    }
    const int width = 32 / packed;
    const int shift = width * (place % packed);
    const uint64_t field = ((uint64_t{1} << width) - 1) << shift;
    bits = static_cast<uint32_t>((bits & ~field) | value << shift);
  }
}

double number(uint64_t bits, Type type) {
  const bool accumulates = type == Type::kF32 || type == Type::kS32;
  return accumulates ? accumulator_element(bits, 0, type) : matrix_element(bits, 0, type);
}

enum class Part : uint8_t { kA, kB, kC };

void move(Warp& warp, const Instruction& instruction, uint32_t) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const bool stores = instruction.second_flag;
  const bool by_column = instruction.flag;
  const auto part = static_cast<Part>(instruction.variant);
  const int rows = part == Part::kB ? matrix.k : matrix.m;
  const int columns = part == Part::kA ? matrix.k : matrix.n;
  const Operand& address = instruction.operands[stores ? 0 : 1];
  const Fragment fragment{&instruction.operands[stores ? 1 : 0], matrix.a_type, rows * columns};
  const int bytes = element_bytes(matrix.a_type);
  const uint64_t base = row(warp, address)[0] + address.offset;
  const uint64_t stride = instruction.num_operands > 2
                              ? static_cast<uint32_t>(row(warp, instruction.operands[2])[0])
                              : static_cast<uint64_t>(by_column ? rows : columns);
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) {
      const uint64_t index = by_column ? c * stride + r : r * stride + c;
      uint8_t* memory = warp.resolve(instruction, 0, base + index * bytes, bytes, instruction.space,
                                     stores ? Access::kWrite : Access::kRead);
      uint64_t value = 0;
      if (stores) {
        value = get(warp, instruction, fragment, r * columns + c);
        std::memcpy(memory, &value, bytes);
        note_generic_write(warp, 0, memory, bytes);
      } else {
        std::memcpy(&value, memory, bytes);
        put(warp, instruction, fragment, r * columns + c, value);
      }
    }
  }
}

std::vector<double> unpack(const Warp& warp, const Instruction& instruction, int operand, Type type,
                           int elements) {
  const Fragment fragment{&instruction.operands[operand], type, elements};
  std::vector<double> values(elements);
  for (int e = 0; e < elements; e++) values[e] = number(get(warp, instruction, fragment, e), type);
  return values;
}

void multiply(Warp& warp, const Instruction& instruction, uint32_t) {
  const MatrixMultiply& matrix = *instruction.matrix;
  const int outputs = matrix.m * matrix.n;
  const auto a = unpack(warp, instruction, 1, matrix.a_type, matrix.m * matrix.k);
  const auto b = unpack(warp, instruction, 2, matrix.b_type, matrix.k * matrix.n);
  auto c = unpack(warp, instruction, 3, matrix.c_type, outputs);
  multiply_add(c.data(), a.data(), b.data(), matrix.m, matrix.n, matrix.k);
  const Fragment fragment{&instruction.operands[0], matrix.d_type, outputs};
  for (int e = 0; e < outputs; e++)
    put(warp, instruction, fragment, e, encode_accumulator(c[e], matrix.d_type, matrix.satfinite));
}

bool decode_multiply(const ParsedInstruction& parsed, Instruction& i, MatrixMultiply& matrix) {
  const std::vector<Type> types = parsed.types();
  if (types.size() == 2) {  // D and C; A and B are f16
    matrix.d_type = types[0];
    matrix.a_type = matrix.b_type = Type::kF16;
    matrix.c_type = types[1];
  } else if (types.size() == 4) {
    matrix.d_type = types[0];
    matrix.a_type = types[1];
    matrix.b_type = types[2];
    matrix.c_type = types[3];
  } else {
    return false;
  }
  for (int k = 0; k < 4; k++)
    if (i.operands[k].kind != OperandKind::kVector) return false;
  i.execute = multiply;
  return true;
}

bool decode_move(const ParsedInstruction& parsed, Instruction& i, MatrixMultiply& matrix) {
  i.second_flag = parsed.has("store");
  i.flag = parsed.has("col");
  Part part = Part::kC;
  if (!i.second_flag && parsed.has("a")) part = Part::kA;
  if (!i.second_flag && parsed.has("b")) part = Part::kB;
  i.variant = static_cast<uint8_t>(part);
  i.space = space_of(parsed);
  matrix.a_type = parsed.types()[0];
  i.execute = move;
  return i.operands[i.second_flag ? 1 : 0].kind == OperandKind::kVector;
}

}  // namespace

bool decode_wmma(const ParsedInstruction& parsed, Instruction& i) {
  if (parsed.opcode != "wmma") return false;
  auto matrix = std::make_unique<MatrixMultiply>();
  bool has_shape = false;
  for (const std::string& modifier : parsed.modifiers)
    has_shape |=
        std::sscanf(modifier.c_str(), "m%dn%dk%d", &matrix->m, &matrix->n, &matrix->k) == 3;
  const std::vector<Type> types = parsed.types();
  const auto is_narrow = [](Type t) { return t == Type::kS4 || t == Type::kU4 || t == Type::kB1; };
  if (!has_shape || types.empty() || std::any_of(types.begin(), types.end(), is_narrow))
    return false;
  matrix->satfinite = parsed.has("satfinite");
  const bool known =
      parsed.has("mma") ? decode_multiply(parsed, i, *matrix) : decode_move(parsed, i, *matrix);
  if (!known) return false;
  i.matrix = std::move(matrix);
  i.control = Control::kWarpSync;
  i.aligned = true;
  return true;
}

}  // namespace mergeme::ptx
