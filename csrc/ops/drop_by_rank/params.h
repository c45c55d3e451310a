#pragma once
#include <cstdint>

#include "csrc/common/task_vector.h"

namespace mergeme::drop_by_rank {

struct Params {
  void* out;                   // [M, rows, length], of the accumulation type
  const void* base;            // [rows, length]
  const void* const* tensors;  // [M] -> [rows, length]
  const double* selection;     // [M, 2]
  void* scratch;               // device only: [blocks, 2, length] bits, then as many places
  int64_t num_models;
  int64_t rows;
  int64_t length;  // below 2^32
  int64_t offset;  // flat index of element 0 in the whole tensor
  uint64_t key;
  bool inverse_prob;
  DType dtype;
};

// Keep probabilities along a row's ranks, from the smallest magnitude's to the largest's.
struct Ramp {
  double low, step;
  MERGEME_HD double at(int64_t rank) const { return low + step * double(rank); }
};
MERGEME_HD Ramp make_ramp(double low, double high, int64_t length) {
  if (length < 2) return {(low + high) / 2, 0};
  return {low, (high - low) / double(length - 1)};
}

// Blocks of the device's launch, a row at a time each, and the bytes of scratch they need.
inline int64_t num_blocks(int64_t num_models, int64_t rows) {
  constexpr int64_t kMaxBlocks = 1024;
  return num_models * rows < kMaxBlocks ? num_models * rows : kMaxBlocks;
}
inline int64_t scratch_bytes(int64_t blocks, int64_t length, DType dtype) {
  const int64_t bits = dtype == DType::kFloat64 ? 8 : 4;
  return blocks * length * 2 * (bits + int64_t(sizeof(uint32_t)));
}

void launch(const Params& params, void* stream);

}  // namespace mergeme::drop_by_rank
