#include "csrc/ops/grouped_matmul/cpu_matrix.h"

#include "csrc/common/grouped_panels.h"

namespace mergeme::grouped_matmul::MERGEME_ISA {

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

}  // namespace mergeme::grouped_matmul::MERGEME_ISA
