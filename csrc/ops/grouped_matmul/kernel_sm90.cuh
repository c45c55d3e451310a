#pragma once
#include "csrc/common/grouped_tile_sm90.cuh"
#include "csrc/ops/grouped_matmul/kernel_sm80.cuh"

namespace mergeme::grouped_matmul {

// Whether tensor maps can describe the operands and rows of results are whole chunks.
inline bool fits_sm90(const Params& p) {
  using grouped::sm90::kMaxSide;
  return fits_sm80(p) && p.out_columns % 8 == 0 && p.a_columns > 0 && p.num_tokens > 0 &&
         p.a_columns <= kMaxSide && p.out_columns <= kMaxSide;
}

// The contract of grouped_matmul_kernel for float16 and bfloat16 on tensor cores of sm_90.
template <typename T, Layout kLayout, typename Shape>
__global__ void __launch_bounds__(grouped::sm90::kThreads, 1) grouped_matmul_sm90_kernel(
    [[maybe_unused]] const __grid_constant__ grouped::sm90::WithMaps<Params> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace grouped::sm90;
  T* out = static_cast<T*>(p.out);
  if constexpr (kLayout == Layout::kTn) {
    using grouped::SumTile;
    using Left = Steps<Shape::kRows, true>;
    using Right = Steps<Shape::kColumns, true>;
    const int64_t n1 = p.a_columns, n2 = p.out_columns;
    multiply_sums<T, Shape>(p.expert_offsets, p.grid, out, n1, n2, [&](const SumTile& t, int) {
      return Operands{Left{&p.a_map, 0, t.begin, t.row}, Right{&p.b_map, 0, t.begin, t.column}};
    });
  } else {
    multiply_rows<T, Shape, kLayout == Layout::kNt>(p.plan, p.grid, &p.a_map, &p.b_map, out,
                                                    static_cast<int>(p.a_columns), p.out_columns,
                                                    static_cast<int>(p.num_experts));
  }
#endif
}

}  // namespace mergeme::grouped_matmul
