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

// out[t, :] = sum over k, in order, of weights[t, k] * rows[inverse[t * top_k + k], :]; rows at and
// after num_rows count as zero. Null weights are ones.
struct CombineTask {
  void* out;
  const void* rows;  // in the accumulation type
  const void* weights;
  const int32_t* inverse;
  int64_t num_rows;
  int64_t top_k;
  int64_t hidden;
  DType dtype;
};

// multiply writes rows of `out`, in the accumulation type if `wide`.

MERGEME_DECLARE_LOOPS(void gate_up(const GateUpTask& task, void* scratch);
                      void multiply(const PanelTask& task, void* out, int64_t ldo, bool wide,
                                    void* scratch);
                      void activation_backward(const ActivationBackwardTask& task, void* scratch);
                      void combine(const CombineTask& task, int64_t begin, int64_t end);)

}  // namespace mergeme::grouped_experts
