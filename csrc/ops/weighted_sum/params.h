#pragma once
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::weighted_sum {

struct Params {
  void* out;                   // [numel]
  const void* const* tensors;  // [M] -> [numel]
  const double* weights;       // [M]
  int64_t num_models;
  int64_t numel;
  bool aligned;  // every [numel] starts at a multiple of 16 bytes
  DType dtype;
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::weighted_sum
