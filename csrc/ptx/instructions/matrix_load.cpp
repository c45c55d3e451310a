// ldmatrix, stmatrix and movmatrix: 8 x 8 matrices of 16-bit elements across a warp. Lane l holds
// elements 2 (l % 4) and the next of row l / 4; rows lie in shared memory where lanes say.
#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/instructions/lanes.h"

namespace mergeme::ptx {
namespace {

constexpr int kRows = 8;
constexpr uint32_t kRowBytes = 16;
constexpr int kMaxMatrices = 4;

struct Place {
  int row;
  int column;
};

// Where half k of a lane's register belongs.
template <bool kTransposed>
Place place_of(int lane, int k) {
  const Place place{lane / 4, lane % 4 * 2 + k};
  return kTransposed ? Place{place.column, place.row} : place;
}

// The rows of the matrices: lane 8 m + r gives the address of row r of matrix m.
struct RowPointers {
  uint8_t* rows[kMaxMatrices * kRows];
};
RowPointers resolve_rows(Warp& warp, const Instruction& instruction, int operand, Access access) {
  RowPointers pointers;
  uint64_t addresses[kWarpSize];
  const int count = instruction.vector_size * kRows;
  const Operand& address = instruction.operands[operand];
  for (int lane = 0; lane < count; lane++) {
    addresses[lane] = row(warp, address)[lane] + address.offset;
    pointers.rows[lane] =
        warp.resolve(instruction, lane, addresses[lane], kRowBytes, instruction.space, access);
  }
  const uint32_t lanes = count == kWarpSize ? kFullMask : (1u << count) - 1;
  if (warp.launch->options.statistics) warp.count_shared(addresses, lanes, kRowBytes);
  return pointers;
}

template <bool kTransposed>
void ldmatrix(Warp& warp, const Instruction& instruction, uint32_t) {
  const RowPointers pointers = resolve_rows(warp, instruction, 1, Access::kRead);
  for (int m = 0; m < instruction.vector_size; m++) {
    uint64_t* d = result_row(warp, element(instruction, instruction.operands[0], m));
    for (int lane = 0; lane < kWarpSize; lane++) {
      uint32_t packed = 0;
      for (int k = 0; k < 2; k++) {
        const Place place = place_of<kTransposed>(lane, k);
        uint16_t value = 0;
        std::memcpy(&value, pointers.rows[m * kRows + place.row] + 2 * place.column, 2);
        packed |= uint32_t{value} << (16 * k);
      }
      d[lane] = packed;
    }
  }
}

template <bool kTransposed>
void stmatrix(Warp& warp, const Instruction& instruction, uint32_t) {
  const RowPointers pointers = resolve_rows(warp, instruction, 0, Access::kWrite);
  for (int m = 0; m < instruction.vector_size; m++) {
    const uint64_t* source = row(warp, element(instruction, instruction.operands[1], m));
    for (int lane = 0; lane < kWarpSize; lane++) {
      for (int k = 0; k < 2; k++) {
        const Place place = place_of<kTransposed>(lane, k);
        const auto value = static_cast<uint16_t>(source[lane] >> (16 * k));
        uint8_t* to = pointers.rows[m * kRows + place.row] + 2 * place.column;
        std::memcpy(to, &value, 2);
        note_generic_write(warp, lane, to, 2);
      }
    }
  }
}

// The transpose of a matrix that lies in registers.
void movmatrix(Warp& warp, const Instruction& instruction, uint32_t) {
  uint64_t* d = result_row(warp, instruction.operands[0]);
  const uint64_t* a = row(warp, instruction.operands[1]);
  uint16_t matrix[kRows][kRows];
  for (int lane = 0; lane < kWarpSize; lane++) {
    for (int k = 0; k < 2; k++) {
      const Place place = place_of<false>(lane, k);
      matrix[place.row][place.column] = static_cast<uint16_t>(a[lane] >> (16 * k));
    }
  }
  for (int lane = 0; lane < kWarpSize; lane++) {
    uint32_t packed = 0;
    for (int k = 0; k < 2; k++) {
      const Place place = place_of<true>(lane, k);
      packed |= uint32_t{matrix[place.row][place.column]} << (16 * k);
    }
    d[lane] = packed;
  }
}

}  // namespace

bool decode_matrix_load(const ParsedInstruction& parsed, Instruction& i) {
  const std::string& op = parsed.opcode;
  if (op != "ldmatrix" && op != "stmatrix" && op != "movmatrix") return false;
  if (!parsed.has("m8n8") || !parsed.has("b16")) return false;
  i.control = Control::kWarpSync;
  i.aligned = true;
  const bool transposed = parsed.has("trans");
  if (op == "movmatrix") {
    i.execute = movmatrix;
    return true;
  }
  i.vector_size = parsed.has("x4") ? 4 : parsed.has("x2") ? 2 : 1;
  i.space = space_of(parsed);
  if (op == "ldmatrix")
    i.execute = transposed ? ldmatrix<true> : ldmatrix<false>;
  else
    i.execute = transposed ? stmatrix<true> : stmatrix<false>;
  return true;
}

}  // namespace mergeme::ptx
