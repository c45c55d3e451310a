#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme::grouped_experts {

// A block's part of silu(gate x) * (up x). In `block`, a is x [T, depth], b the expert's first gate
// row of the block's columns, out the activation; lda, ldb and ldo as in grouped products.
struct GateUpBlock {
  GroupedBlock block;
  const int32_t* slots;  // [rows]: the row's slot; its token is slot / top_k
  int64_t top_k;
  int64_t up_offset;  // elements from a gate row to its up row
};

// out[t, :] = sum over k, in order, of weights[t, k] * expert_out[inverse[t * top_k + k], :].
struct CombineTask {
  void* out;
  const void* expert_out;
  const void* weights;
  const int32_t* inverse;
  int64_t top_k;
  int64_t hidden;
  DType dtype;
};

// scratch holds kBlockScratchBytes, aligned to 64. multiply_down writes the accumulation type.
MERGEME_DECLARE_LOOPS(void gate_up(const GateUpBlock& task, void* scratch);
                      void multiply_down(const GroupedBlock& block, void* scratch);
                      void combine(const CombineTask& task, int64_t begin, int64_t end);)

}  // namespace mergeme::grouped_experts
