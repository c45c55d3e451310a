// The grouped kernel of CUTLASS 3.x (arrays of pointers, tensor maps rewritten for each group) with
// the tile of ours, 128 x 256 x 64, two math warpgroups on one tile, clusters of two blocks.
// Compiled with PARAMS it is a program that prints how to launch the kernel and the bytes of its
// argument; its tensor maps are then the interpreter's.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

using namespace cute;
using Element = cutlass::bfloat16_t;
using Rows = cutlass::layout::RowMajor;
using Columns = cutlass::layout::ColumnMajor;
using TileShape = Shape<_128, _256, _64>;
using ClusterShape = Shape<_2, _1, _1>;
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Rows*, 8, Element, Rows*,
    8, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Rows*, 8, Element, Columns*, 8,
    float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(Epilogue::SharedStorage))>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
using Problem = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
struct Kernel : cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue> {};

#ifndef PARAMS
template __global__ void cutlass::device_kernel<Kernel>(CUTLASS_GRID_CONSTANT Kernel::Params const);
#endif
