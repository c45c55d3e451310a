#include "csrc/simt/host/test_kernels.h"

#include <map>

#include "csrc/simt/host/test_kernels.cuh"

namespace mergeme::simt::testing {
namespace {

const std::map<std::string, void (*)(Params)> kKernels = {
    {"place", place_kernel},
    {"order", order_kernel},
    {"block_sum", block_sum_kernel},
    {"block_votes", block_votes_kernel},
    {"warp_calls", warp_calls_kernel},
    {"fma", fma_kernel},
    {"atomics", atomics_kernel},
    {"mma_bfloat16", mma_kernel<bfloat16_t>},
    {"mma_float16", mma_kernel<float16_t>},
    {"store_16", store_16_kernel},
    {"round_pair_bfloat16", round_pair_kernel<bfloat16_t>},
    {"round_pair_float16", round_pair_kernel<float16_t>},
    {"ldmatrix_x4", ldmatrix_kernel<4, false>},
    {"ldmatrix_x4_trans", ldmatrix_kernel<4, true>},
    {"ldmatrix_x2", ldmatrix_kernel<2, false>},
    {"ldmatrix_x2_trans", ldmatrix_kernel<2, true>},
    {"copy_1", copy_pipeline_kernel<1, 0, true>},
    {"copy_2", copy_pipeline_kernel<2, 1, true>},
    {"copy_3", copy_pipeline_kernel<3, 2, true>},
    {"bad_copy_wait", copy_pipeline_kernel<2, 2, true>},
    {"bad_copy_barrier", copy_pipeline_kernel<2, 1, false>},
    {"bad_uninitialised", bad_uninitialised_kernel},
    {"bad_assert", bad_assert_kernel},
    {"bad_leave", bad_leave_kernel},
    {"bad_two_barriers", bad_two_barriers_kernel},
    {"bad_barrier_and_warp", bad_barrier_and_warp_kernel},
    {"bad_mask", bad_mask_kernel},
    {"bad_two_calls", bad_two_calls_kernel},
    {"bad_shuffle", bad_shuffle_kernel},
    {"bad_shared_store", bad_shared_store_kernel},
    {"bad_global_store", bad_global_store_kernel},
    {"bad_overflow", bad_overflow_kernel},
    {"bad_alignment", bad_alignment_kernel},
    {"bad_dangling", bad_dangling_kernel},
    {"bad_copy", bad_copy_kernel},
    {"stack", stack_kernel},
};

}  // namespace

std::vector<unsigned char> run(const std::string& kernel, const LaunchConfig& config,
                               const std::vector<unsigned char>& in,
                               const std::vector<unsigned char>& out, int64_t n) {
  std::vector<unsigned char> input = in, output = out;
  launch(kernel.c_str(), config, kKernels.at(kernel),
         Params{.in = input.data(), .out = output.data(), .n = n});
  return output;
}

}  // namespace mergeme::simt::testing
