// DeepGEMM's grouped product of block-scaled float8 (1 x 128 and 128 x 128 scales), 128 x 128 x
// 128, five stages, two math warpgroups.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

#ifndef MULTICAST
#define MULTICAST 2
#endif

template __global__ void deep_gemm::sm90_fp8_gemm_1d2d_impl<
    0, 0, 0, 1, 128, 128, 128, 128, 5, 0, 128, 256, MULTICAST, false, 132,
    deep_gemm::GemmType::MGroupedContiguous, deep_gemm::EpilogueIdentity, false>(
    float*, int*, int*, uint32_t, uint32_t, uint32_t, const __grid_constant__ cute::TmaDescriptor,
    const __grid_constant__ cute::TmaDescriptor, const __grid_constant__ cute::TmaDescriptor,
    const __grid_constant__ cute::TmaDescriptor);
