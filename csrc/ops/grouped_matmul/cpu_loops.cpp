#include "csrc/ops/grouped_matmul/cpu_loops.h"

#include "csrc/common/grouped_loops.h"

namespace mergeme::grouped_matmul::MERGEME_ISA {

void multiply_nt(const GroupedBlock& block, void* scratch) {
  dispatch_floating(block.dtype, [&]<typename T>() { multiply_nt_block<T>(block, scratch); });
}

void multiply_nn(const GroupedBlock& block, void* scratch) {
  dispatch_floating(block.dtype, [&]<typename T>() { multiply_nn_block<T>(block, scratch); });
}

void multiply_tn(const GroupedBlock& block, void* scratch) {
  dispatch_floating(block.dtype, [&]<typename T>() { multiply_tn_block<T>(block, scratch); });
}

}  // namespace mergeme::grouped_matmul::MERGEME_ISA
