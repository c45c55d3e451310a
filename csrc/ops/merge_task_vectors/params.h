#pragma once
#include <cstdint>

#include "csrc/common/task_vector.h"

namespace mergeme::merge_task_vectors {

// How the sign of an output element is chosen among the models.
enum class Elect : int32_t { kNone, kSum, kCount, kUnweighted };

struct Params {
  void* out;                   // [numel]
  const void* base;            // [numel]
  const void* const* tensors;  // [M] -> [numel]
  const double* weights;       // [M]
  const double* scales;        // [M]
  const double* selection;     // [M, selection_width(mask)]
  void* terms;                 // [M] Term of the accumulation type: scratch
  double* total;               // [1] sum of weights: scratch
  int64_t num_models;
  int64_t numel;
  int64_t offset;  // flat index of element 0 in the whole tensor
  uint64_t key;
  double lam;
  Mask mask;
  Elect elect;
  bool normalize;
  bool aligned;  // every [numel] starts at a multiple of 16 bytes, and offset is one of 8
  DType dtype;
};

void launch(const Params& params, void* stream);

// Bytes `terms` needs for one model.
inline constexpr int64_t kTermBytes = sizeof(Term<double>);

// What an unnormalised or unelected sum is divided by, from the sum of all weights.
MERGEME_HD double divisor_of(double total) { return total < 1e-8 && total > -1e-8 ? 1.0 : total; }

}  // namespace mergeme::merge_task_vectors
