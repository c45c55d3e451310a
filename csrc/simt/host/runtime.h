// Host-side SIMT: runs a kernel as plain C++, one fiber per CUDA thread. Test-only, torch-free.
//
// One block at a time on one OS thread; launches from several OS threads wait for one another. A
// thread runs until it ends or reaches a collective call (barrier, warp call, mma...); only there
// may another run. So the shim shows a race only between such points, and only under a schedule
// that brings the two sides into the wrong order. It knows nothing of memory ordering, of blocks
// that are alive at one time, of coalescing, occupancy or speed.
//
// Stricter than hardware on purpose:
//   - shared memory holds NaN patterns (bytes 0xFF) when a block starts, and writing past its end
//     is reported;
//   - all threads of a block meet at the same barrier call in the source; none may have left;
//   - a warp mask names the calling lane and only lanes that exist and have not left, and all lanes
//     it names make the same call with the same mask;
//   - what a lane reads from a lane that its mask does not name is a NaN pattern.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// __shared__ is left undefined on purpose: kernels use simt::dynamic_shared<T>().

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline constinit uint3 threadIdx{}, blockIdx{};
inline constinit dim3 blockDim{}, gridDim{};

namespace mergeme::simt::host {

using Where = std::source_location;

inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // sm_90; smaller devices refuse earlier

// Order in which the threads that can run are run, and the blocks of a grid.
enum class Schedule { kForward, kReverse, kShuffled };
void set_schedule(Schedule schedule, uint64_t seed);

// What simt::compute_capability() returns.
inline int compute_capability = 80;

// A launch as it reaches run_elsewhere: `kernel` is the address of the host's copy of the kernel.
struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
  const void* params;
  size_t params_bytes;
  bool overlaps;
};
// Where launches go instead of run_grid(), while it is set: to an interpreter of what nvcc made of
// the kernels.
inline std::function<void(const Launch&)> run_elsewhere;

// Runs `thread` once for every thread of the grid. Throws std::runtime_error, naming the kernel and
// where possible the block and the thread, at the first failure; the rest of the grid is dropped
// without unwinding, so kernels own no resources.
void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& thread);

// The block's dynamic shared memory; and whether [p, p + bytes) lies in it.
void* shared_base();
bool is_shared(const void* p, size_t bytes);

// Ends the launch with `what`, the kernel's name, the block and the thread.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_at(const std::string& what, Where where);

// Waits until every thread of the block has called; returns how many gave a true `predicate`.
unsigned block_barrier(const char* call, bool predicate, Where where);

// Waits until every lane of `mask` has called. The last to come runs `complete` once for all of
// them: lanes[i] is lane i's record, or null where the mask does not name it.
void warp_collective(const char* call, unsigned mask, void* record,
                     void (*complete)(void* const* lanes), Where where);

// The calling thread's queue of asynchronous copies of 16 bytes to shared memory. From issue to the
// matching wait the destination holds NaN patterns. Copies never waited for never land.
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(unsigned groups_left);

}  // namespace mergeme::simt::host
