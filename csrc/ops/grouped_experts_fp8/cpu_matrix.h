#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"
#include "csrc/ops/grouped_experts/activation.h"

namespace mergeme::grouped_experts_fp8 {

// Rows of gate_up x become rows of f(gate) * up. The panels' columns are gate and up side by side.
struct GateUpTask {
  ScaledTask product;
  float* activation;     // [rows, I], at the task's first row
  int64_t intermediate;  // I
  grouped_experts::Activation kind;
};

MERGEME_DECLARE_MATRIX(void gate_up(const GateUpTask& task, void* scratch);)

}  // namespace mergeme::grouped_experts_fp8
