#pragma once
#include <cstdint>

#include "csrc/common/task_vector.h"

namespace mergeme::magnitude_threshold {

using Count = unsigned long long;  // what atomicAdd takes

inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int64_t kMaxTiles = 4096;

// What is known of a model's threshold while its digits are found, the highest first.
struct State {
  uint64_t bits;  // magnitude bits, zero below the digits found
  int64_t rank;   // the threshold is the rank-th largest of those that share the digits found
};

struct Params {
  double* out;                 // [M, 2]
  const void* base;            // [numel]
  const void* const* tensors;  // [M] -> [numel]
  const int64_t* keep;         // [M], each in [0, numel]
  State* states;               // [M]: scratch
  Count* histogram;            // [M, kBins]: scratch
  int64_t* equal;              // [M, tiles]: scratch
  int64_t num_models;
  int64_t numel;
  DType dtype;
  // Set by the launcher.
  int shift = 0, digit_bits = 0;  // the digit of this pass
  int64_t tile = 0;               // elements of a tile
};

// Bytes of scratch for one model: states, histogram and equal in this order.
inline constexpr int64_t kScratchBytes =
    sizeof(State) + kBins * sizeof(Count) + kMaxTiles * sizeof(int64_t);

void launch(const Params& params, void* stream);

}  // namespace mergeme::magnitude_threshold
