#pragma once
#include "csrc/common/cpu_features.h"
#include "csrc/common/grouped_blocks.h"
#include "csrc/ops/grouped_experts/activation.h"

namespace mergeme::grouped_experts {

// Rows of gate_up x become rows of f(gate) * up. The panels' columns are gate and up side by side.
// Pointers are at the task's first row.
struct GateUpTask {
  PanelTask product;
  void* activation;      // [rows, I]
  void* preactivation;   // [rows, 2I], gate then up; or null
  int64_t intermediate;  // I
  Activation kind;
};

// Rows of grad down, the gradient of the activation before weighting, become what the rest of the
// backward reads. Pointers are at the task's first row.
struct ActivationBackwardTask {
  PanelTask product;
  const void* preactivation;  // [rows, 2I]
  void* grad_preactivation;   // [rows, 2I], or null
  void* weighted_activation;  // [rows, I], the row's weight times its activation; or null
  void* weight_dots;          // [rows, panels]: <gradient, activation> over a panel
  const void* weights;        // [T * K] in the accumulation type, by slot
  const int32_t* slots;       // [rows]
  int64_t intermediate;
  int64_t panels;
  Activation kind;
};

MERGEME_DECLARE_MATRIX(void gate_up(const GateUpTask& task, void* scratch);
                       void activation_backward(const ActivationBackwardTask& task, void* scratch);)

}  // namespace mergeme::grouped_experts
