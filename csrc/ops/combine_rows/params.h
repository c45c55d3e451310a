#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::combine_rows {

// Which row of the weights element i of the whole tensor takes: kAll the first, kRow row
// i / row_length, kColumn row i % row_length.
enum class Axis : int32_t { kAll, kRow, kColumn };

struct Params {
  void* out;                   // [numel]
  const void* base;            // [numel] or null
  const void* const* tensors;  // [M] -> [numel]
  const double* weights;       // [G, M]
  int64_t num_models;
  int64_t numel;
  int64_t offset;  // of the chunk's first element in the whole tensor
  int64_t row_length;
  bool aligned;  // every [numel] starts at a multiple of 16 bytes
  Axis axis;
  DType dtype;
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::combine_rows
