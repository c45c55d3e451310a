#pragma once
#include <algorithm>
#include <cstdint>

#include "csrc/common/numeric.h"

namespace mergeme::router_statistics {

inline constexpr int kLanes = 32;  // partial sums of a row: expert e belongs to lane e % 32

// Tokens are cut into chunks. A chunk's sums run in token order, then the chunks' in chunk order.
struct Params {
  const void* logits;   // [T, E]
  const int32_t* ids;   // [T, K], each in [0, E)
  const bool* mask;     // [T], or null: all tokens count
  int32_t* counts;      // [E], out; zeros before
  void* sums;           // [E], out; float, double for float64 logits
  void* squares;        // [1], out; like sums
  void* partials;       // [C, E + 1] scratch, like sums
  int64_t num_tokens;   // T
  int64_t num_experts;  // E, at least 1
  int64_t top_k;        // K, may be 0
  int64_t chunk;        // tokens of a chunk
  int64_t num_chunks;   // C
  DType dtype;          // of logits
};

struct BackwardParams {
  const void* grad_sums;     // [E], like sums
  const void* grad_squares;  // [1], like squares
  const void* logits;        // [T, E]
  const bool* mask;          // [T], or null
  void* grad_logits;         // [T, E], out, the type of logits
  int64_t num_tokens;
  int64_t num_experts;
  DType dtype;
};

// Short chunks keep a GPU busy, few chunks the second stage short.
inline int64_t chunk_size(int64_t num_tokens) {
  constexpr int64_t kMinChunk = 16, kMaxChunks = 1024;
  return std::max(kMinChunk, ceil_div(num_tokens, kMaxChunks));
}

void launch(const Params& params, void* stream);
void launch_backward(const BackwardParams& params, void* stream);

}  // namespace mergeme::router_statistics
