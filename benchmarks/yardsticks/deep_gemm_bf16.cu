// DeepGEMM's grouped bfloat16 product (rows sorted by group, each group padded to its tile) with
// the tile of ours: 128 x TILE_N x 64, two math warpgroups. Sizes stay run-time values, which its
// own compile-at-first-use makes constants.
#include <cuda_bf16.h>

#include <deep_gemm/impls/sm90_bf16_gemm.cuh>

#ifndef TILE_N
#define TILE_N 256
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef LAST_STAGES  // k-steps of 64 modulo the stages: a constant there
#define LAST_STAGES 1
#endif
#ifndef MULTICAST
#define MULTICAST 2
#endif

template __global__ void deep_gemm::sm90_bf16_gemm_impl<
    0, 0, 0, 1, 128, TILE_N, 64, 128, STAGES, LAST_STAGES, 128, 256, MULTICAST, false, 132,
    deep_gemm::GemmType::MGroupedContiguous, cutlass::bfloat16_t>(
    int*, uint32_t, uint32_t, uint32_t, const __grid_constant__ cute::TmaDescriptor,
    const __grid_constant__ cute::TmaDescriptor, const __grid_constant__ cute::TmaDescriptor);
