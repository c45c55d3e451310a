#include "csrc/ops/grouped_matmul_fp8/cpu_matrix.h"

#include "csrc/common/grouped_scaled.h"

namespace mergeme::grouped_matmul_fp8::MERGEME_ISA {

void multiply(const ScaledTask& task, void* out, DType dtype, void* scratch) {
  const int64_t ldo = task.product.columns;
  multiply_scaled_panels(
      task, scratch, [&](int64_t row, int64_t rows, int64_t panel, const float* c, int64_t ldc) {
        const int64_t column = panel * kPanelColumns;
        const int64_t columns = smaller(kPanelColumns, ldo - column);
        dispatch_floating(dtype, [&]<typename Out>() {
          if constexpr (sizeof(Out) <= 4)
            store_panel(static_cast<Out*>(out) + row * ldo + column, ldo, rows, columns, c, ldc);
        });
      });
}

}  // namespace mergeme::grouped_matmul_fp8::MERGEME_ISA
