#include "csrc/simt/host/runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "csrc/simt/host/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mergeme::simt::host {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kGuardBytes = 256;  // behind shared memory

struct Failure {  // thrown through a kernel to end its thread
  std::string what;
};

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  uint64_t group;
};

enum class State : uint8_t { kFresh, kReady, kAtBarrier, kAtWarpCall, kDone };

struct Thread {
  unsigned index = 0;  // x fastest
  uint3 id{};
  Fiber* fiber = nullptr;  // while it runs or waits
  // The call it waits in.
  const char* call = nullptr;
  Where where;
  unsigned mask = 0;
  void* record = nullptr;
  // Asynchronous copies, oldest first; `groups` have been committed.
  std::vector<Copy> copies;
  uint64_t groups = 0;
};

struct Warp {
  unsigned waiting = 0, left = 0;  // lanes in a warp call; lanes that have ended
};

struct Barrier {
  unsigned arrived = 0, votes = 0, result = 0;
  const Thread* first = nullptr;
};

struct Runtime {
  std::mutex mutex;  // one launch at a time
  Schedule schedule = Schedule::kForward;
  uint64_t seed = 0;
  std::mt19937_64 random;

  // The launch.
  const char* name = "";
  const std::function<void()>* body = nullptr;
  std::string failure;

  // The block.
  std::vector<Thread> threads;
  std::vector<State> states;    // by thread
  std::vector<unsigned> order;  // in which threads get their turn
  size_t cursor = 0;            // next place in `order`
  unsigned num_threads = 0, runnable = 0, done = 0;
  std::vector<Warp> warps;
  Barrier barrier;
  size_t shared_bytes = 0;
  alignas(128) unsigned char shared[kMaxSharedBytes + kGuardBytes];

  // Stacks, kept for the life of the process; a thread that never waits needs none of its own.
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Fiber* host = nullptr;     // run_grid's own stack
  Fiber* running = nullptr;  // the stack in use
  Thread* current = nullptr;
};

Runtime& rt = *new Runtime;  // never destroyed: a fiber may outlive static destruction

std::string text(uint3 v) {
  return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
}
std::string place(const Thread& t) {
  return "[block " + text(blockIdx) + " thread " + text(t.id) + "]";
}
std::string source(const Where& w) {
  const std::string file = w.file_name();
  const size_t root = file.find("csrc/");  // the build's own prefix says nothing
  return file.substr(root == std::string::npos ? 0 : root) + ":" + std::to_string(w.line());
}
std::string hex(unsigned mask) {
  char out[16];
  snprintf(out, sizeof out, "0x%08x", mask);
  return out;
}
std::string describe(const Thread& t) {
  switch (rt.states[t.index]) {
    case State::kDone:
      return "has left";
    case State::kAtBarrier:
      return std::string("waits at ") + t.call + " (" + source(t.where) + ")";
    case State::kAtWarpCall:
      return std::string("waits at ") + t.call + " (" + source(t.where) + ") with mask " +
             hex(t.mask);
    default:
      return "can run";
  }
}
std::string describe_other(const Thread& t) { return "thread " + text(t.id) + " " + describe(t); }

// The next thread to run, or null if none can.
Thread* next_thread() {
  if (rt.runnable == 0) return nullptr;
  for (;;) {
    if (rt.cursor == rt.num_threads) {
      rt.cursor = 0;
      if (rt.schedule == Schedule::kShuffled)
        std::shuffle(rt.order.begin(), rt.order.end(), rt.random);
    }
    const unsigned i = rt.order[rt.cursor++];
    if (rt.states[i] <= State::kReady) return &rt.threads[i];
  }
}

void make_current(Thread& t) {
  rt.current = &t;
  threadIdx = t.id;
}

void thread_main();

Fiber* idle_fiber() {
  if (rt.idle.empty()) {
    rt.fibers.push_back(std::make_unique<Fiber>(thread_main, rt.fibers.size()));
    return rt.fibers.back().get();
  }
  Fiber* fiber = rt.idle.back();
  rt.idle.pop_back();
  return fiber;
}

// Leaves the running stack for `next`'s, or for run_grid's if it is null.
void resume(Thread* next) {
  Fiber* target = rt.host;
  if (next != nullptr) {
    make_current(*next);
    if (next->fiber == nullptr) next->fiber = idle_fiber();
    target = next->fiber;
  }
  Fiber* from = std::exchange(rt.running, target);
  if (from != target) from->switch_to(*target);
}

// What a stack does: run a thread to its end, then the next that has not begun, else lie idle.
void thread_main() {
  Fiber::started();
  for (;;) {
    Thread& self = *rt.current;
    rt.states[self.index] = State::kReady;
    try {
      (*rt.body)();
    } catch (const Failure& failure) {
      rt.failure = failure.what;
    } catch (...) {
      rt.failure = std::string(rt.name) + ": a C++ exception left the kernel " + place(self);
    }
    Fiber* mine = std::exchange(self.fiber, nullptr);
    if (!rt.failure.empty()) {
      resume(nullptr);  // never returns: run_grid resets every stack
    }
    rt.states[self.index] = State::kDone;
    rt.warps[self.index / kWarpSize].left |= 1u << self.index % kWarpSize;
    ++rt.done;
    --rt.runnable;
    Thread* next = next_thread();
    if (next != nullptr && next->fiber == nullptr) {
      make_current(*next);
      next->fiber = mine;
    } else {
      rt.idle.push_back(mine);
      resume(next);
    }
  }
}

void wait_as(State why, const char* call, const Where& where) {
  Thread& self = *rt.current;
  self.call = call;
  self.where = where;
  rt.states[self.index] = why;
  --rt.runnable;
}

void release(unsigned index) {
  rt.states[index] = State::kReady;
  ++rt.runnable;
}

// Called when no thread can run and some have not ended: says why, from the side of the first one
// that waits.
std::string explain_deadlock() {
  const auto of_state = [](State s) -> const Thread* {
    for (unsigned i = 0; i < rt.num_threads; ++i)
      if (rt.states[i] == s) return &rt.threads[i];
    return nullptr;
  };
  const Thread* at_barrier = of_state(State::kAtBarrier);
  const Thread* at_warp_call = of_state(State::kAtWarpCall);
  const std::string prefix = std::string(rt.name) + ": ";
  if (at_warp_call == nullptr) {
    const Thread* gone = of_state(State::kDone);
    return prefix + "a thread left the block before " + at_barrier->call + ": " +
           describe_other(*gone) + ", while this one " + describe(*at_barrier) + " " +
           place(*at_barrier);
  }
  const unsigned warp = at_warp_call->index / kWarpSize * kWarpSize;
  for (unsigned l = 0; l < kWarpSize; ++l) {
    if ((at_warp_call->mask >> l & 1u) == 0) continue;
    const Thread& other = rt.threads[warp + l];
    if (rt.states[other.index] == State::kAtWarpCall && other.mask == at_warp_call->mask) continue;
    return prefix + "deadlock (divergent barrier or warp mask): this thread " +
           describe(*at_warp_call) + ", but " + describe_other(other) + " " + place(*at_warp_call);
  }
  return prefix + "deadlock " + place(*at_warp_call);
}

std::string check_shared_guard() {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char* guard = rt.shared + rt.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (guard[i] != 0xFF)
      return std::string(rt.name) + ": a store " + std::to_string(i) + " bytes past the end of " +
             std::to_string(rt.shared_bytes) + " bytes of shared memory [block " + text(blockIdx) +
             "]";
#endif
  return {};
}

void check_launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string(name) + ": invalid launch configuration: " + what);
  };
  const auto size = [](dim3 d) { return text({d.x, d.y, d.z}); };
  if (block.x > 1024 || block.y > 1024 || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > 1024 || uint64_t{block.x} * block.y * block.z == 0)
    refuse("expected 1 to 1024 threads per block and at most 64 in z, got " + size(block));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0)
    refuse("expected at least one block, got a grid of " + size(grid));
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("expected a grid of at most 2147483647,65535,65535, got " + size(grid));
  if (shared_bytes > kMaxSharedBytes)
    refuse("expected at most " + std::to_string(kMaxSharedBytes) + " bytes of shared memory, got " +
           std::to_string(shared_bytes));
}

void begin_launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                  const std::function<void()>& body) {
  rt.name = name;
  rt.body = &body;
  gridDim = grid;
  blockDim = block;
  rt.shared_bytes = shared_bytes;
  rt.num_threads = block.x * block.y * block.z;
  rt.threads.resize(rt.num_threads);
  for (unsigned i = 0; i < rt.num_threads; ++i) {
    rt.threads[i].index = i;
    rt.threads[i].id = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    rt.threads[i].fiber = nullptr;
  }
  rt.order.resize(rt.num_threads);
  std::iota(rt.order.begin(), rt.order.end(), 0u);
  if (rt.schedule == Schedule::kReverse) std::reverse(rt.order.begin(), rt.order.end());
  if (rt.schedule == Schedule::kShuffled) rt.random.seed(rt.seed);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(rt.shared, sizeof rt.shared);
  __asan_poison_memory_region(rt.shared + shared_bytes, sizeof rt.shared - shared_bytes);
#endif
}

void begin_block() {
  rt.states.assign(rt.num_threads, State::kFresh);
  rt.warps.assign((rt.num_threads + kWarpSize - 1) / kWarpSize, Warp{});
  rt.barrier = {};
  rt.runnable = rt.num_threads;
  rt.done = 0;
  rt.cursor = rt.num_threads;  // a new round, shuffled if asked
  for (Thread& t : rt.threads) {
    t.copies.clear();
    t.groups = 0;
  }
#if defined(__SANITIZE_ADDRESS__)
  memset(rt.shared, 0xFF, rt.shared_bytes);
#else
  memset(rt.shared, 0xFF, rt.shared_bytes + kGuardBytes);
#endif
}

void run_block() {
  begin_block();
  Thread* first = next_thread();
  resume(first);
  if (rt.failure.empty() && rt.done < rt.num_threads) rt.failure = explain_deadlock();
  if (rt.failure.empty()) rt.failure = check_shared_guard();
}

// Drops what every stack was doing; also what a later launch would find of this one.
void drop_threads() {
  rt.idle.clear();
  for (const auto& fiber : rt.fibers) {
    fiber->reset();
    rt.idle.push_back(fiber.get());
  }
}

}  // namespace

void set_schedule(Schedule schedule, uint64_t seed) {
  const std::lock_guard lock(rt.mutex);
  rt.schedule = schedule;
  rt.seed = seed;
}

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& thread) {
  check_launch(name, grid, block, shared_bytes);
  const std::lock_guard lock(rt.mutex);
  begin_launch(name, grid, block, shared_bytes, thread);
  Fiber host;
  rt.host = rt.running = &host;
  // Blocks in order, backwards, or from a random one on in steps that meet every block once.
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t at = 0, step = 1;
  if (rt.schedule == Schedule::kReverse) at = step = count - 1;
  if (rt.schedule == Schedule::kShuffled) {
    at = rt.random() % count;
    do step = rt.random() % count + 1;
    while (std::gcd(step, count) != 1);
  }
  for (uint64_t i = 0; i < count; ++i, at = (at + step) % count) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    run_block();
    if (rt.failure.empty()) continue;
    drop_threads();
    throw std::runtime_error(std::exchange(rt.failure, {}));
  }
}

void* shared_base() { return rt.shared; }

bool is_shared(const void* p, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(rt.shared);
  return at >= base && at - base + bytes <= rt.shared_bytes;
}

void fail(const std::string& what) {
  throw Failure{std::string(rt.name) + ": " + what + " " + place(*rt.current)};
}

void fail_at(const std::string& what, Where where) { fail(what + " at " + source(where)); }

unsigned block_barrier(const char* call, bool predicate, Where where) {
  Barrier& b = rt.barrier;
  wait_as(State::kAtBarrier, call, where);
  if (b.arrived++ == 0) b.first = rt.current;
  b.votes += predicate;
  const Where& met = b.first->where;
  if (met.line() != where.line() || met.column() != where.column() ||
      strcmp(met.file_name(), where.file_name()) != 0)
    fail("divergent barrier: this thread " + describe(*rt.current) + ", but " +
         describe_other(*b.first));
  if (b.arrived == rt.num_threads) {
    b = {.result = b.votes};
    for (unsigned i = 0; i < rt.num_threads; ++i) release(i);
  }
  resume(next_thread());
  return b.result;
}

void warp_collective(const char* call, unsigned mask, void* record,
                     void (*complete)(void* const* lanes), Where where) {
  Thread& self = *rt.current;
  const unsigned lane = self.index % kWarpSize, base = self.index - lane;
  Warp& warp = rt.warps[self.index / kWarpSize];
  const unsigned lanes = std::min(rt.num_threads - base, kWarpSize);
  const unsigned missing = lanes == kWarpSize ? 0 : mask >> lanes << lanes;
  wait_as(State::kAtWarpCall, call, where);
  self.mask = mask;
  self.record = record;
  if ((mask >> lane & 1u) == 0)
    fail("a warp mask lacks the calling lane: this thread " + describe(self));
  if (missing != 0)
    fail("a warp mask names lanes that the block does not have (" + hex(missing) +
         "): this thread " + describe(self));
  if ((mask & warp.left) != 0)
    fail("a warp mask names lanes that have left (" + hex(mask & warp.left) + "): this thread " +
         describe(self));
  warp.waiting |= 1u << lane;
  bool all_here = (warp.waiting & mask) == mask;
  void* records[kWarpSize] = {};
  for (unsigned l = 0; l < kWarpSize && all_here; ++l) {
    if ((mask >> l & 1u) == 0) continue;
    const Thread& other = rt.threads[base + l];
    const bool same = other.mask == mask && strcmp(other.call, call) == 0;
    if (!same && (other.mask >> lane & 1u) != 0)
      fail("divergent warp call: this thread " + describe(self) + ", but " + describe_other(other));
    all_here = same;  // else it is in a call of other lanes and may come here later
    records[l] = other.record;
  }
  if (all_here) {
    complete(records);
    warp.waiting &= ~mask;
    for (unsigned l = 0; l < kWarpSize; ++l)
      if (mask >> l & 1u) release(base + l);
  }
  resume(next_thread());
}

void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp_async_16: expected both addresses to be multiples of 16");
  if (!is_shared(shared, 16)) fail("cp_async_16: expected a destination in shared memory");
  memset(shared, 0xFF, 16);
  rt.current->copies.push_back({shared, global, valid, rt.current->groups});
}

void copy_commit() { ++rt.current->groups; }

void copy_wait(unsigned groups_left) {
  Thread& self = *rt.current;
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group + groups_left < self.groups; ++copy) {
    if (copy->valid)
      memcpy(copy->shared, copy->global, 16);
    else
      memset(copy->shared, 0, 16);
  }
  self.copies.erase(self.copies.begin(), copy);
}

}  // namespace mergeme::simt::host
