#include "csrc/ops/grouped_experts_fp8/cpu_matrix.h"

#include "csrc/common/grouped_scaled.h"
#include "csrc/ops/grouped_experts/cpu_activation.h"

namespace mergeme::grouped_experts_fp8::MERGEME_ISA {

void gate_up(const GateUpTask& task, void* scratch) {
  constexpr int64_t kHalf = kPanelColumns / 2;
  const int64_t intermediate = task.intermediate;
  multiply_scaled_panels(
      task.product, scratch,
      [&](int64_t row, int64_t rows, int64_t panel, const float* c, int64_t ldc) {
        const int64_t column = panel * kHalf, columns = smaller(kHalf, intermediate - column);
        float* out = task.activation + row * intermediate + column;
        grouped_experts::dispatch_activation(task.kind, [&]<grouped_experts::Activation kKind>() {
          for (int64_t r = 0; r < rows; ++r, c += ldc, out += intermediate)
            for_vectors<float>(
                columns, [&](int64_t j, int64_t some) __attribute__((always_inline)) {
                  FloatVector gate = load(c + j), up = load(c + kHalf + j), unused;
                  store_first(out + j, grouped_experts::activate<kKind, false>(gate, unused) * up,
                              some);
                });
        });
      });
}

}  // namespace mergeme::grouped_experts_fp8::MERGEME_ISA
