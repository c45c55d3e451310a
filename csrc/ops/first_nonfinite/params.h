#pragma once
#include <cstdint>

#include "csrc/common/task_vector.h"

namespace mergeme::first_nonfinite {

inline constexpr int64_t kNone = INT64_MAX;  // where nothing was found: above every index
inline constexpr int kThreads = 256;         // of a CUDA block
inline constexpr int64_t kMaxBlocks = 2048;  // CUDA blocks, and so partial results, at most

struct Params {
  int64_t* out;        // [], the first index, or -1
  const void* tensor;  // [numel]
  int64_t* partials;   // [kMaxBlocks]: scratch
  int64_t numel;
  int64_t blocks;  // CUDA blocks that write `partials`; launch sets it
  bool aligned;    // `tensor` starts at a multiple of 16 bytes
  DType dtype;
};

void launch(const Params& params, void* stream);

}  // namespace mergeme::first_nonfinite
