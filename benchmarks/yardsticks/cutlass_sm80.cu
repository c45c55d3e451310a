// The grouped kernel of CUTLASS 2.x with the tile, stages and instruction of ours. Compiled with
// PARAMS it is a program that prints how to launch the kernel and the bytes of its argument.
#include <cstdio>
#include <cstdlib>

#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/kernel/default_gemm_grouped.h"
#include "cutlass/gemm/kernel/gemm_grouped.h"

using Element = cutlass::bfloat16_t;
using cutlass::gemm::GemmShape;
using Kernel = cutlass::gemm::kernel::DefaultGemmGrouped<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, Element,
    cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8, Element,
    cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;

#ifndef PARAMS
template __global__ void cutlass::Kernel<Kernel>(Kernel::Params);
#else
// Arguments: groups, blocks, and the addresses of the groups' sizes, of the pointers to A, B and D
// and of their leading dimensions.
int main(int, char** argv) {
  const auto number = [&](int i) { return strtoull(argv[i], nullptr, 0); };
  const auto strides = [&](int i) { return reinterpret_cast<int64_t*>(number(i)); };
  const auto tensors = [&](int i) { return reinterpret_cast<Element**>(number(i)); };
  const Kernel::Arguments arguments(reinterpret_cast<cutlass::gemm::GemmCoord*>(number(3)),
                                    int(number(1)), int(number(2)), {1.0f, 0.0f}, tensors(4),
                                    tensors(5), tensors(6), tensors(6), strides(7), strides(8),
                                    strides(9), strides(9), nullptr);
  const Kernel::Params params(arguments, nullptr, 0);
  printf("%d %d ", int(Kernel::kThreadCount), int(sizeof(Kernel::SharedStorage)));
  for (size_t i = 0; i < sizeof params; ++i)
    printf("%02x", reinterpret_cast<const unsigned char*>(&params)[i]);
  printf("\n");
}
#endif
