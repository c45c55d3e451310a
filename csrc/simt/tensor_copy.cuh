// Copies of boxes of a tensor to shared memory (TMA, sm_90), each instruction wrapped once, for the
// device only. Torch-free.
//
// The box, the tensor's sizes and strides and how the box lies in shared memory are in a tensor map
// (tensor_map.h). With the 128-byte swizzle, the only one used, a box of 128 bytes by R rows by one
// is R rows of 128 bytes, and 16-byte chunk c of row r lies where chunk c ^ (r % 8) would.
#pragma once
#include "csrc/simt/mbarrier.cuh"
#include "csrc/simt/tensor_map.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace mergeme::simt {

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Begins the copy of the box whose first element is [z, y, x], x the innermost; zeros for what lies
// outside the tensor. `to` is a multiple of 1024 under the 128-byte swizzle. The whole box, zeros
// included, counts on `barrier`. By one thread.
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap* map, int x, int y,
                                         int z, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// The same to this address in every block of the cluster whose bit is set in `blocks`, counting on
// the barrier at this address there.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, SharedAddress to, const TensorMap* map,
                                            int x, int y, int z, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(blocks)
      : "memory");
}

}  // namespace mergeme::simt
#endif
