// CUTLASS 2.x kernels for the tests of the interpreter. Compiled twice: to PTX, and to a program
// that prints how a kernel is launched and the bytes of its parameters:
//   KERNEL M N K A B C D ALPHA BETA
//   grouped COUNT BLOCKS SIZES A B C D LDA LDB LDC LDD ALPHA BETA
// with addresses of the process that will interpret the kernel.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm.h"
#include "cutlass/gemm/kernel/default_gemm_grouped.h"
#include "cutlass/gemm/kernel/gemm_grouped.h"

using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using cutlass::bfloat16_t;
using cutlass::float_e4m3_t;
using cutlass::half_t;
using cutlass::arch::OpClassSimt;
using cutlass::arch::OpClassTensorOp;
using cutlass::arch::Sm80;
using cutlass::arch::Sm89;
using cutlass::epilogue::thread::LinearCombination;
using cutlass::gemm::GemmShape;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>;

template <typename T, typename LayoutA, typename LayoutB, typename Out, typename Acc, typename Op,
          typename Arch, typename Tile, typename WarpTile, typename Instruction, int kOutVector,
          int kStages, int kAlignment>
using Gemm =
    cutlass::gemm::device::Gemm<T, LayoutA, T, LayoutB, Out, Row, Acc, Op, Arch, Tile, WarpTile,
                                Instruction, LinearCombination<Out, kOutVector, Acc, Acc>, Swizzle,
                                kStages, kAlignment, kAlignment>;

// bf16 by columns of B into float32; bf16 by rows of B, so through ldmatrix.trans, into bf16; and
// the other operand types, each with an mma of its own.
using Bf16Tn = Gemm<bfloat16_t, Row, Column, float, float, OpClassTensorOp, Sm80,
                    GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, GemmShape<16, 8, 16>, 4, 4, 8>;
using Bf16Tt = Gemm<bfloat16_t, Row, Row, bfloat16_t, float, OpClassTensorOp, Sm80,
                    GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, GemmShape<16, 8, 16>, 8, 3, 8>;
using Tf32 = Gemm<float, Row, Column, float, float, OpClassTensorOp, Sm80, GemmShape<64, 64, 16>,
                  GemmShape<32, 32, 16>, GemmShape<16, 8, 8>, 4, 3, 4>;
using S8 = Gemm<int8_t, Row, Column, int32_t, int32_t, OpClassTensorOp, Sm80, GemmShape<64, 64, 64>,
                GemmShape<32, 32, 64>, GemmShape<16, 8, 32>, 4, 3, 16>;
using F64 = Gemm<double, Row, Column, double, double, OpClassTensorOp, Sm80, GemmShape<64, 64, 16>,
                 GemmShape<32, 32, 16>, GemmShape<8, 8, 4>, 1, 3, 1>;
using F16 = Gemm<half_t, Column, Row, half_t, half_t, OpClassTensorOp, Sm80, GemmShape<64, 64, 32>,
                 GemmShape<32, 32, 32>, GemmShape<16, 8, 16>, 8, 3, 8>;
using F32 = Gemm<float, Row, Column, float, float, OpClassSimt, Sm80, GemmShape<64, 64, 8>,
                 GemmShape<32, 32, 8>, GemmShape<1, 1, 1>, 1, 3, 1>;
using E4m3 = Gemm<float_e4m3_t, Row, Column, float, float, OpClassTensorOp, Sm89,
                  GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, GemmShape<16, 8, 32>, 4, 3, 16>;
using Grouped = cutlass::gemm::kernel::DefaultGemmGrouped<
    bfloat16_t, Row, cutlass::ComplexTransform::kNone, 8, bfloat16_t, Column,
    cutlass::ComplexTransform::kNone, 8, float, Row, float, OpClassTensorOp, Sm80,
    GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, GemmShape<16, 8, 16>,
    LinearCombination<float, 4, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;

template <typename Kernel>
__device__ void run(const typename Kernel::Params& params) {
  extern __shared__ char storage[];
  Kernel()(params, *reinterpret_cast<typename Kernel::SharedStorage*>(storage));
}
extern "C" {
__global__ void bf16_tn(Bf16Tn::GemmKernel::Params p) { run<Bf16Tn::GemmKernel>(p); }
__global__ void bf16_tt(Bf16Tt::GemmKernel::Params p) { run<Bf16Tt::GemmKernel>(p); }
__global__ void tf32(Tf32::GemmKernel::Params p) { run<Tf32::GemmKernel>(p); }
__global__ void s8(S8::GemmKernel::Params p) { run<S8::GemmKernel>(p); }
__global__ void f64(F64::GemmKernel::Params p) { run<F64::GemmKernel>(p); }
__global__ void f16(F16::GemmKernel::Params p) { run<F16::GemmKernel>(p); }
__global__ void f32(F32::GemmKernel::Params p) { run<F32::GemmKernel>(p); }
__global__ void e4m3(E4m3::GemmKernel::Params p) { run<E4m3::GemmKernel>(p); }
__global__ void grouped(Grouped::Params p) { run<Grouped>(p); }
}

template <typename Kernel>
void print(dim3 grid, const typename Kernel::Params& params) {
  std::printf("%u %u %u %d %d ", grid.x, grid.y, grid.z, int(Kernel::kThreadCount),
              int(sizeof(typename Kernel::SharedStorage)));
  for (size_t i = 0; i < sizeof params; i++)
    std::printf("%02x", reinterpret_cast<const unsigned char*>(&params)[i]);
}

template <typename T>
T* address(const char* text) {
  return reinterpret_cast<T*>(std::strtoull(text, nullptr, 0));
}

template <typename G>
void print_gemm(char** argv) {
  using Kernel = typename G::GemmKernel;
  using A = typename Kernel::Mma::IteratorA;
  using B = typename Kernel::Mma::IteratorB;
  using C = typename Kernel::Epilogue::OutputTileIterator;
  const int m = std::atoi(argv[0]);
  const int n = std::atoi(argv[1]);
  const int k = std::atoi(argv[2]);
  using Out = typename G::ElementC;
  using Compute = typename Kernel::OutputOp::ElementCompute;
  const bool a_by_columns = std::is_same_v<typename G::LayoutA, Column>;
  const bool b_by_columns = std::is_same_v<typename G::LayoutB, Column>;
  Swizzle swizzle;
  const cutlass::gemm::GemmCoord size(m, n, k);
  const auto tiles = swizzle.get_tiled_shape(
      size, {G::ThreadblockShape::kM, G::ThreadblockShape::kN, G::ThreadblockShape::kK}, 1);
  const typename A::TensorRef a(address<typename A::Element>(argv[3]),
                                typename A::Layout(a_by_columns ? m : k));
  const typename B::TensorRef b(address<typename B::Element>(argv[4]),
                                typename B::Layout(b_by_columns ? k : n));
  const typename C::TensorRef c(address<Out>(argv[5]), typename C::Layout(n));
  const typename C::TensorRef d(address<Out>(argv[6]), typename C::Layout(n));
  const typename Kernel::OutputOp::Params scales(Compute(std::atof(argv[7])),
                                                 Compute(std::atof(argv[8])));
  print<Kernel>(swizzle.get_grid_shape(tiles),
                typename Kernel::Params(size, tiles, a, b, c, d, scales, nullptr));
}

void print_grouped(char** argv) {
  const int blocks = std::atoi(argv[1]);
  const typename Grouped::EpilogueOutputOp::Params scales(float(std::atof(argv[11])),
                                                          float(std::atof(argv[12])));
  const Grouped::Arguments arguments(
      address<cutlass::gemm::GemmCoord>(argv[2]), std::atoi(argv[0]), blocks, scales,
      address<bfloat16_t*>(argv[3]), address<bfloat16_t*>(argv[4]), address<float*>(argv[5]),
      address<float*>(argv[6]), address<int64_t>(argv[7]), address<int64_t>(argv[8]),
      address<int64_t>(argv[9]), address<int64_t>(argv[10]), nullptr);
  print<Grouped>(dim3(blocks), Grouped::Params(arguments, nullptr, 0));
}

int main(int, char** argv) {
  const auto is = [&](const char* name) { return !std::strcmp(argv[1], name); };
  if (is("bf16_tn")) print_gemm<Bf16Tn>(argv + 2);
  if (is("bf16_tt")) print_gemm<Bf16Tt>(argv + 2);
  if (is("tf32")) print_gemm<Tf32>(argv + 2);
  if (is("s8")) print_gemm<S8>(argv + 2);
  if (is("f64")) print_gemm<F64>(argv + 2);
  if (is("f16")) print_gemm<F16>(argv + 2);
  if (is("f32")) print_gemm<F32>(argv + 2);
  if (is("e4m3")) print_gemm<E4m3>(argv + 2);
  if (is("grouped")) print_grouped(argv + 2);
}
