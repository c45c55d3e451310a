// Barriers of sm_90 that count arrivals and bytes, and what goes with them; each instruction
// wrapped once, for the device only: the host shim is an sm_80. Torch-free.
//
// An mbarrier is 8 bytes of shared memory. It is in a phase until as many threads have arrived as
// it was made for and as many bytes have been copied as were announced; then it begins the next.
// Phases are told apart by their parity, 0 for the first: whoever waits for the end of a phase
// must know that no later one can have ended meanwhile.
#pragma once
#include <cstdint>

#include "csrc/simt/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace mergeme::simt {

// Bytes from the start of the block's shared memory window, what instructions of sm_90 take.
using SharedAddress = uint32_t;

// By one thread; before others touch it: fence_mbarrier_init() by the same thread, then a barrier.
__device__ __forceinline__ void mbarrier_init(SharedAddress barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival. What this thread has read and written lies before the phase's end.
__device__ __forceinline__ void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, which announces `bytes` of copies that count on this barrier.
__device__ __forceinline__ void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// One arrival, as soon as all cp_async_16() of this thread so far have landed. What they wrote is
// seen by whoever waits for the phase, but by tensor cores and tensor copies only behind
// fence_async_proxy().
__device__ __forceinline__ void mbarrier_arrive_copied(SharedAddress barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity has ended; waits a little for it.
__device__ __forceinline__ bool mbarrier_try_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.b32 %0, 1, 0, ended;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// This block's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A barrier of all threads of the cluster that have not left.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// One arrival at the barrier that lies at this address in block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(SharedAddress barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Between what this thread wrote to shared memory, or saw written by ordinary stores and
// cp_async_16(), and what tensor cores and tensor copies do there later, by whose hand ever.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of `threads` threads of the block, whole warps; `number` is 1 to 15, and 0 is
// __syncthreads().
__device__ __forceinline__ void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace mergeme::simt
#endif
