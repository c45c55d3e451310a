// CUTLASS 3.x kernels of sm_90a for the tests of the interpreter: TMA, mbarriers, clusters with
// multicast, wgmma, setmaxnreg, specialised warps. Compiled twice, as cutlass_sm80.cu is; the
// program writes tensor maps in the interpreter's layout.
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "csrc/ptx/tensor_map.h"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

using cute::_1;
using cute::_128;
using cute::_16;
using cute::_2;
using cute::_32;
using cute::_64;
using cute::Shape;
using cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Plain = cutlass::gemm::KernelTmaWarpSpecialized;
using PingPong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using PlainFp8 = cutlass::gemm::KernelTmaWarpSpecializedFP8FastAccum;

template <typename T, typename LayoutA, typename LayoutB, typename Cluster, typename Schedule,
          typename Tile>
struct Builder {
  static constexpr int kAlignment = 16 / sizeof(T);
  using EpilogueSchedule = std::conditional_t<std::is_same_v<Schedule, Cooperative>,
                                              cutlass::epilogue::TmaWarpSpecializedCooperative,
                                              cutlass::epilogue::TmaWarpSpecialized>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, bfloat16_t, Row, 8, bfloat16_t,
      Row, 8, EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, LayoutA, kAlignment, T, LayoutB,
      kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
};
template <typename LayoutA, typename LayoutB, typename Cluster, typename Schedule,
          typename Tile = Shape<_128, _128, _64>, typename T = bfloat16_t>
using Gemm = typename Builder<T, LayoutA, LayoutB, Cluster, Schedule, Tile>::Kernel;

// Majors of both operands, clusters along M and N, the three schedules; tiles of narrow swizzles;
// and 8-bit operands.
using PlainTn = Gemm<Row, Column, Shape<_1, _1, _1>, Plain>;
using CooperativeTt = Gemm<Row, Row, Shape<_2, _1, _1>, Cooperative>;
using PingPongNn = Gemm<Column, Column, Shape<_1, _2, _1>, PingPong>;
using Swizzle64 = Gemm<Row, Row, Shape<_1, _1, _1>, Plain, Shape<_64, _32, _32>>;
using Swizzle32 = Gemm<Row, Row, Shape<_1, _1, _1>, Plain, Shape<_64, _16, _16>>;
using E4m3 =
    Gemm<Row, Column, Shape<_1, _1, _1>, PlainFp8, Shape<_64, _64, _64>, cutlass::float_e4m3_t>;

#if !defined(HOST_ONLY)
template <typename Kernel>
__device__ void run(const typename Kernel::Params& params) {
  extern __shared__ char storage[];
  Kernel()(params, storage);
}
// The bounds are CUTLASS's own: setmaxnreg needs to know how many threads there are.
#define KERNEL(name, Kernel)                                                       \
  extern "C" __global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock,         \
                                               Kernel::MinBlocksPerMultiprocessor) \
      name(const __grid_constant__ Kernel::Params p) {                             \
    run<Kernel>(p);                                                                \
  }
KERNEL(plain_tn, PlainTn)
KERNEL(cooperative_tt, CooperativeTt)
KERNEL(ping_pong_nn, PingPongNn)
KERNEL(swizzle_64, Swizzle64)
KERNEL(swizzle_32, Swizzle32)
KERNEL(e4m3, E4m3)
#endif

// What of the driver CUTLASS's host code calls.
extern "C" {
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType format,
                                        cuuint32_t rank, void* address, const cuuint64_t* dims,
                                        const cuuint64_t* strides, const cuuint32_t* box,
                                        const cuuint32_t* element_strides,
                                        CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                        CUtensorMapFloatOOBfill fill) {
  constexpr int kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (interleave) return CUDA_ERROR_INVALID_VALUE;
  mergeme::ptx::TensorMap ours{};
  ours.magic = ours.kMagic;
  ours.address = reinterpret_cast<uint64_t>(address);
  ours.rank = rank;
  ours.format = format;
  ours.swizzle = swizzle;
  ours.fill = fill;
  ours.element_bytes = kBytes[format];
  for (cuuint32_t k = 0; k < ours.kMaxRank; k++) {
    ours.dims[k] = k < rank ? dims[k] : 1;
    ours.box[k] = k < rank ? box[k] : 1;
    ours.element_strides[k] = k < rank ? element_strides[k] : 1;
    if (k + 1 < rank) ours.strides[k] = strides[k];
  }
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &ours, sizeof ours);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorString(CUresult, const char** text) {
  *text = "?";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorName(CUresult, const char** text) {
  *text = "?";
  return CUDA_SUCCESS;
}
}

template <typename Kernel>
void print(char** argv) {
  const int m = std::atoi(argv[0]);
  const int n = std::atoi(argv[1]);
  const int k = std::atoi(argv[2]);
  const auto address = [&](int i) { return std::strtoull(argv[i], nullptr, 0); };
  const auto packed = [](auto stride, int rows, int cols) {
    return cutlass::make_cute_packed_stride(stride, cute::make_shape(rows, cols, 1));
  };
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = 0;
  hardware.sm_count = 4;
  const typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {reinterpret_cast<typename Kernel::ElementA*>(address(3)),
       packed(typename Kernel::StrideA{}, m, k),
       reinterpret_cast<typename Kernel::ElementB*>(address(4)),
       packed(typename Kernel::StrideB{}, n, k)},
      {{float(std::atof(argv[7])), float(std::atof(argv[8]))},
       reinterpret_cast<bfloat16_t*>(address(5)),
       packed(typename Kernel::StrideC{}, m, n),
       reinterpret_cast<bfloat16_t*>(address(6)),
       packed(typename Kernel::StrideD{}, m, n)},
      hardware};
  using Params = typename Kernel::Params;
  alignas(128) static unsigned char bytes[sizeof(Params)];  // zeros where it has gaps
  const auto& params = *new (bytes) Params(Kernel::to_underlying_arguments(arguments, nullptr));
  const dim3 grid = Kernel::get_grid_shape(params);
  std::printf("%u %u %u %u %d ", grid.x, grid.y, grid.z, Kernel::get_block_shape().x,
              int(Kernel::SharedStorageSize));
  for (const unsigned char byte : bytes) std::printf("%02x", byte);
}

int main(int, char** argv) {
  const auto is = [&](const char* name) { return !std::strcmp(argv[1], name); };
  if (is("plain_tn")) print<PlainTn>(argv + 2);
  if (is("cooperative_tt")) print<CooperativeTt>(argv + 2);
  if (is("ping_pong_nn")) print<PingPongNn>(argv + 2);
  if (is("swizzle_64")) print<Swizzle64>(argv + 2);
  if (is("swizzle_32")) print<Swizzle32>(argv + 2);
  if (is("e4m3")) print<E4m3>(argv + 2);
}
