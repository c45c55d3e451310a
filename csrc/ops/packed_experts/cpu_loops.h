#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme::packed_experts {

// One expert's weight and its panels. Element (row, k) of the weight is at row * row_stride + k *
// k_stride; one of the strides is 1.
struct PackTask {
  void* weight;
  void* packed;
  int64_t rows;  // of the weight (of gate, if gated)
  int64_t depth;
  int64_t row_stride;
  int64_t k_stride;
  PanelColumns columns;
  int64_t element_size;  // 2 or 4
};

// Panels [begin, end): from the weight, or back into it.
MERGEME_DECLARE_LOOPS(void pack(const PackTask& task, int64_t begin, int64_t end);
                      void unpack(const PackTask& task, int64_t begin, int64_t end);)

}  // namespace mergeme::packed_experts
