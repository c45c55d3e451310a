#include "csrc/ops/grouped_matmul/cpu_loops.h"

#include "csrc/common/grouped_panels.h"

namespace mergeme::grouped_matmul::MERGEME_ISA {

void multiply(const PanelTask& task, void* out, int64_t ldo, void* scratch) {
  dispatch_floating(task.dtype, [&]<typename T>() {
    multiply_panels<T>(
        task, scratch,
        [&](int64_t row, int64_t rows, int64_t panel, const acc_t<T>* c, int64_t ldc) {
          const int64_t column = panel * kPanelColumns;
          store_panel(static_cast<T*>(out) + row * ldo + column, ldo, rows,
                      smaller(kPanelColumns, task.columns - column), c, ldc);
        });
  });
}

}  // namespace mergeme::grouped_matmul::MERGEME_ISA
