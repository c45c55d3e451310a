#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"

namespace mergeme::grouped_matmul {

// One block in each layout; scratch holds kBlockScratchBytes, aligned to 64.
MERGEME_DECLARE_LOOPS(void multiply_nt(const GroupedBlock& block, void* scratch);
                      void multiply_nn(const GroupedBlock& block, void* scratch);
                      void multiply_tn(const GroupedBlock& block, void* scratch);)

}  // namespace mergeme::grouped_matmul
