#include "csrc/ops/grouped_experts/cpu_loops.h"

#include "csrc/common/grouped_panels.h"
#include "csrc/ops/grouped_experts/cpu_activation.h"

namespace mergeme::grouped_experts {
namespace {

// Calls fn(j, some) for a row's columns, a vector or less at a time.
template <typename Acc, typename F>
MERGEME_INLINE void for_vectors(int64_t columns, F fn) {
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t j = 0; j < columns; j += kWidth) fn(j, smaller(kWidth, columns - j));
}

template <typename T>
MERGEME_INLINE auto load_first(const T* from, int64_t some) {
  return some == kLanes<acc_t<T>> ? load(from) : load_some(from, some);
}
template <typename T>
MERGEME_INLINE void store_first(T* to, vector_t<acc_t<T>> value, int64_t some) {
  if (some == kLanes<acc_t<T>>)
    store(to, value);
  else
    store_some(to, value, some);
}

template <Activation kKind, typename T>
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
}

template <Activation kKind, typename T>
void activation_backward_rows(const ActivationBackwardTask& task, void* scratch) {
  using Acc = acc_t<T>;
  const int64_t intermediate = task.intermediate;
  multiply_panels<T>(
      task.product, scratch,
      [&](int64_t row, int64_t rows, int64_t panel, const Acc* c, int64_t ldc) {
        const int64_t column = panel * kPanelColumns;
        const int64_t columns = smaller(kPanelColumns, intermediate - column);
        for (int64_t r = row; r < row + rows; ++r, c += ldc) {
          const auto weight = broadcast(static_cast<const Acc*>(task.weights)[task.slots[r]]);
          const T* pre = static_cast<const T*>(task.preactivation) + 2 * r * intermediate + column;
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
}

template <typename T>
void combine_tokens(const CombineTask& task, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Acc* rows = static_cast<const Acc*>(task.rows);
  for (int64_t t = begin; t < end; ++t) {
    const Acc* weights =
        task.weights ? static_cast<const Acc*>(task.weights) + t * task.top_k : nullptr;
    const int32_t* inverse = task.inverse + t * task.top_k;
    T* out = static_cast<T*>(task.out) + t * task.hidden;
    for_vectors<Acc>(task.hidden, [&](int64_t h, int64_t some) __attribute__((always_inline)) {
      vector_t<Acc> sum = {};
      for (int64_t k = 0; k < task.top_k; ++k) {
        if (inverse[k] >= task.num_rows) continue;
        const auto value = load_first(rows + int64_t{inverse[k]} * task.hidden + h, some);
        sum = weights ? fma(broadcast(weights[k]), value, sum) : sum + value;
      }
      store_first(out + h, sum, some);
    });
  }
}

}  // namespace

namespace MERGEME_ISA {

void gate_up(const GateUpTask& task, void* scratch) {
  dispatch_floating(task.product.dtype, [&]<typename T>() {
    dispatch_activation(task.kind,
                        [&]<Activation kKind>() { gate_up_rows<kKind, T>(task, scratch); });
  });
}

void multiply(const PanelTask& task, void* out, int64_t ldo, bool wide, void* scratch) {
  dispatch_floating(task.dtype, [&]<typename T>() {
    multiply_panels<T>(
        task, scratch,
        [&](int64_t row, int64_t rows, int64_t panel, const acc_t<T>* c, int64_t ldc) {
          const int64_t column = panel * kPanelColumns, at = row * ldo + column;
          const int64_t columns = smaller(kPanelColumns, task.columns - column);
          if (wide)
            store_panel(static_cast<acc_t<T>*>(out) + at, ldo, rows, columns, c, ldc);
          else
            store_panel(static_cast<T*>(out) + at, ldo, rows, columns, c, ldc);
        });
  });
}

void activation_backward(const ActivationBackwardTask& task, void* scratch) {
  dispatch_floating(task.product.dtype, [&]<typename T>() {
    dispatch_activation(
        task.kind, [&]<Activation kKind>() { activation_backward_rows<kKind, T>(task, scratch); });
  });
}

void combine(const CombineTask& task, int64_t begin, int64_t end) {
  dispatch_floating(task.dtype, [&]<typename T>() { combine_tokens<T>(task, begin, end); });
}

}  // namespace MERGEME_ISA
}  // namespace mergeme::grouped_experts
