#include "csrc/ops/grouped_experts/cpu_matrix.h"

#include "csrc/common/grouped_panels.h"
#include "csrc/ops/grouped_experts/cpu_activation.h"

namespace mergeme::grouped_experts {
namespace {

template <typename T>
void gate_up_rows(const GateUpTask& task, void* scratch) {
  using Acc = acc_t<T>;
  constexpr int64_t kHalf = kPanelColumns / 2;
  const int64_t intermediate = task.intermediate;
  multiply_panels<T>(
      task.product, scratch,
      [&](int64_t row, int64_t rows, int64_t panel, const Acc* c, int64_t ldc) {
        const int64_t column = panel * kHalf, columns = smaller(kHalf, intermediate - column);
        T* out = static_cast<T*>(task.activation) + row * intermediate + column;
        T* pre = static_cast<T*>(task.preactivation) + 2 * row * intermediate + column;
        dispatch_activation(task.kind, [&]<Activation kKind>() {
          for (int64_t r = 0; r < rows; ++r, c += ldc, out += intermediate, pre += 2 * intermediate)
            for_vectors<Acc>(columns, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
              vector_t<Acc> gate = load(c + j), up = load(c + kHalf + j), unused;
              store_first(out + j, activate<kKind, false>(gate, unused) * up, some);
              if (task.preactivation) {
                store_first(pre + j, gate, some);
                store_first(pre + intermediate + j, up, some);
              }
            });
        });
      });
}

template <typename T>
void activation_backward_rows(const ActivationBackwardTask& task, void* scratch) {
  using Acc = acc_t<T>;
  const int64_t intermediate = task.intermediate;
  multiply_panels<T>(
      task.product, scratch,
      [&](int64_t row, int64_t rows, int64_t panel, const Acc* c, int64_t ldc) {
        const int64_t column = panel * kPanelColumns;
        const int64_t columns = smaller(kPanelColumns, intermediate - column);
        dispatch_activation(task.kind, [&]<Activation kKind>() {
          for (int64_t r = row; r < row + rows; ++r, c += ldc) {
            const auto weight = broadcast(static_cast<const Acc*>(task.weights)[task.slots[r]]);
            const T* pre =
                static_cast<const T*>(task.preactivation) + 2 * r * intermediate + column;
            T* grad = static_cast<T*>(task.grad_preactivation) + 2 * r * intermediate + column;
            T* weighted = static_cast<T*>(task.weighted_activation) + r * intermediate + column;
            vector_t<Acc> dots = {};
            for_vectors<Acc>(columns, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
              const auto gate = load_first(pre + j, some);
              const auto up = load_first(pre + intermediate + j, some);
              vector_t<Acc> slope;
              const vector_t<Acc> activated = activate<kKind, true>(gate, slope);
              const vector_t<Acc> unweighted = load(c + j), activation = activated * up;
              dots += unweighted * activation;  // zero past the end: so is `unweighted`
              if (task.grad_preactivation) {
                const vector_t<Acc> both = weight * unweighted;
                store_first(grad + j, both * up * slope, some);
                store_first(grad + intermediate + j, both * activated, some);
              }
              if (task.weighted_activation) store_first(weighted + j, weight * activation, some);
            });
            static_cast<Acc*>(task.weight_dots)[r * task.panels + panel] = sum_lanes<Acc>(dots);
          }
        });
      });
}

}  // namespace

namespace MERGEME_ISA {

void gate_up(const GateUpTask& task, void* scratch) {
  dispatch_floating(task.product.dtype, [&]<typename T>() { gate_up_rows<T>(task, scratch); });
}

void activation_backward(const ActivationBackwardTask& task, void* scratch) {
  dispatch_floating(task.product.dtype,
                    [&]<typename T>() { activation_backward_rows<T>(task, scratch); });
}

}  // namespace MERGEME_ISA
}  // namespace mergeme::grouped_experts
