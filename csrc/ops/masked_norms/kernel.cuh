#pragma once
#include "csrc/ops/masked_norms/params.h"
#include "csrc/simt/device.cuh"

namespace mergeme::masked_norms {

// terms[m] = what the sums need to know of model m. One thread per model, grid-stride.
template <typename Acc>
__global__ void prepare_kernel(Params p) {
  auto* terms = static_cast<Term<Acc>*>(p.terms);
  for (int64_t m = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; m < p.num_models;
       m += int64_t{gridDim.x} * blockDim.x) {
    const double* row = p.selection + m * selection_width(p.mask);
    if (p.mask == Mask::kRandom) MERGEME_DEVICE_ASSERT(row[0] >= 0 && row[0] <= 1);
    terms[m] = make_term<Acc>(p.tensors[m], 1.0, 1.0, p.mask, row);
  }
}

// What a block shares. The words are those of the block's 512 groups, as drop_words gives them.
struct Shared {
  double sums[4][kLanes];  // l1, squares, masked l1, masked squares
  uint64_t most[2][kLanes];
  uint32_t words[kSumBlock / 2];
};

// partials[m, b] = the six sums and maxima of block b of model m, in the order params.h states.
// A CUDA block owns such blocks, grid-stride in x, and models, grid-stride in y; a thread is a
// lane.
template <typename T>
__global__ void partials_kernel(Params p) {
  using Acc = acc_t<T>;
  auto& shared = *simt::dynamic_shared<Shared>();
  const int64_t blocks = ceil_div(p.numel, kSumBlock);
  const int lane = int(threadIdx.x);
  for (int64_t m = blockIdx.y; m < p.num_models; m += gridDim.y) {
    const Term<Acc> term = static_cast<const Term<Acc>*>(p.terms)[m];
    for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
      const int64_t first = b * kSumBlock;
      if (p.mask == Mask::kRandom) {
        for (int g = lane; g < kSumBlock / kDecisionsPerGroup; g += kLanes) {
          const auto group = uint64_t(first / kDecisionsPerGroup + g);
          const PhiloxWords words = drop_words(p.key, group, uint32_t(m));
          for (int w = 0; w < 4; ++w) shared.words[4 * g + w] = words.w[w];
        }
        __syncthreads();
      }
      double sums[4] = {};
      uint64_t most[2] = {};
      for (int j = lane; j < kSumBlock && first + j < p.numel; j += kLanes) {
        const int64_t i = first + j;
        const auto bits = magnitude_bits(to_acc(static_cast<const T*>(term.data)[i]) -
                                         to_acc(static_cast<const T*>(p.base)[i]));
        const auto low = i < term.cut.tie_end ? term.cut.before : term.cut.after;
        bool kept;
        if (p.mask == Mask::kRandom)
          kept = ((shared.words[j / 2] >> (j % 2 * 16)) & 0xffffu) < term.keep_below;
        else if (p.mask == Mask::kBand)
          kept = in_band<Acc>(bits, low, i < term.top.tie_end ? term.top.before : term.top.after);
        else
          kept = bits >= low;
        const double x = magnitude_of(bits), masked = kept ? x : 0.0;
        sums[0] += x;
        sums[1] += x * x;
        sums[2] += masked;
        sums[3] += masked * masked;
        if (bits > most[0]) most[0] = bits;
        if (kept && bits > most[1]) most[1] = bits;
      }
      for (int s = 0; s < 4; ++s) shared.sums[s][lane] = sums[s];
      for (int s = 0; s < 2; ++s) shared.most[s][lane] = most[s];
      for (int half = kLanes / 2; half > 0; half /= 2) {
        simt::sync_before_folding(half);
        if (lane < half) {
          for (int s = 0; s < 4; ++s) shared.sums[s][lane] += shared.sums[s][lane + half];
          for (int s = 0; s < 2; ++s)
            if (shared.most[s][lane + half] > shared.most[s][lane])
              shared.most[s][lane] = shared.most[s][lane + half];
        }
      }
      if (lane == 0) {
        double* partial = p.partials + (m * blocks + b) * kNorms;
        for (int s = 0; s < 2; ++s) {
          partial[3 * s] = shared.sums[2 * s][0];
          partial[3 * s + 1] = shared.sums[2 * s + 1][0];
          partial[3 * s + 2] = magnitude_of(magnitude_t<Acc>(shared.most[s][0]));
        }
      }
      __syncthreads();  // before the next block overwrites what lane 0 reads
    }
  }
}

// out[m, s] = sum or maximum of the partials, in index order; l2 is its root. A CUDA block owns a
// model, a thread one of the six.
__global__ void finish_kernel(Params p) {
  const int64_t blocks = ceil_div(p.numel, kSumBlock);
  const int s = int(threadIdx.x);
  for (int64_t m = blockIdx.x; m < p.num_models && s < kNorms; m += gridDim.x) {
    const double* partials = p.partials + m * blocks * kNorms + s;
    double value = 0;
    if (s % 3 == 2) {
      for (int64_t b = 0; b < blocks; ++b) value = greater(value, partials[b * kNorms]);
    } else {
      for (int64_t b = 0; b < blocks; ++b) value += partials[b * kNorms];
    }
    p.out[m * kNorms + s] = s % 3 == 1 ? sqrt(value) : value;
  }
}

}  // namespace mergeme::masked_norms
