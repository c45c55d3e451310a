// The tile of a grouped product of e4m3 operands with scales on the tensor cores of sm_90.
// Torch-free.
//
// A stage holds 128 reduction steps, which is what a scale goes with. The tensor cores, whose sums
// of e4m3 products keep about 14 bits (DeepSeek-V3 report), sum one stage from zero; threads add
// that, times both scales, to a float32 of their own.
#pragma once
#include "csrc/common/float8_blocks.h"
#include "csrc/common/grouped_tile_sm90.cuh"

namespace mergeme::grouped::sm90 {

// Half the columns of Shared: a thread has a stage's sums beside its own, and the columns of a half
// of a tile have the same scale. One math warpgroup multiplies while the other adds.
using Scaled = Shape<128, 128, 2>;
static_assert(kDepthOf<float8_e4m3_t> == kScaleBlock && Scaled::kColumns == kScaleBlock);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A thread's scales: of its two rows, null for none, and of both halves of the columns; neighbours
// go with neighbouring stages.
struct Scales {
  const float* rows[2];
  const float* columns[2];
};

// sums as in multiply_tile(), but of both operands times their scales, one fused multiply-add for
// each stage.
template <bool kGathered>
__device__ __forceinline__ void multiply_scaled_tile(Ring<Scaled>& ring, int depth, int group,
                                                     const Scales& scales, Scaled::Sums& sums) {
  float partial[64];
#pragma unroll
  for (int j = 0; j < 64; ++j) sums[0][j] = partial[j] = 0;
  simt::pin(partial);
  const uint64_t left = simt::operand_at<Run::kDepth>(ring.address() + group * kBlockBytes);
  const uint64_t right = simt::operand_at<Run::kDepth>(ring.address() + Scaled::kLeftBytes);
  const int steps = steps_of<float8_e4m3_t>(depth);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    // Under way while the stage is waited for and multiplied.
    const float column[2] = {scales.columns[0][step], scales.columns[1][step]};
    const float row[2] = {scales.rows[0] ? scales.rows[0][step] : 0.f,
                          scales.rows[1] ? scales.rows[1][step] : 0.f};
    ring.wait_full();
    if constexpr (kGathered) simt::fence_async_proxy();
    simt::wgmma_fence();
    const uint64_t at = simt::operand_step(Scaled::kStageBytes) * ring.at();
    simt::wgmma_e4m3<true>(partial, left + at, right + at);
#pragma unroll
    for (int part = 1; part < kLineBytes / 32; ++part)
      simt::wgmma_e4m3<false>(partial, left + at + simt::operand_step(part * 32),
                              right + at + simt::operand_step(part * 32));
    simt::wgmma_commit();
    simt::wgmma_wait<0>();
    simt::pin(partial);
    ring.release(ring.at());
    ring.next();
    const float scale[2][2] = {{row[0] * column[0], row[1] * column[0]},
                               {row[0] * column[1], row[1] * column[1]}};
#pragma unroll
    for (int j = 0; j < 64; ++j)
      sums[0][j] = simt::fma(scale[j / 32][j / 2 % 2], partial[j], sums[0][j]);
    simt::pin(sums[0]);  // before partial is written anew
  }
}

#endif

}  // namespace mergeme::grouped::sm90
