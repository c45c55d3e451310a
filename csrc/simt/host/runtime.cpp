#include "csrc/simt/host/runtime.h"
#include <ucontext.h>
#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace mergeme::simt::host {
namespace {
enum class State { kReady, kBlock, kWarp, kDone };
struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  uint3 tid{};
  State state = State::kReady;
  unsigned mask = 0;
  uint64_t value = 0;
  std::array<uint64_t, 32> received{};
};
constexpr size_t kStackBytes = 64 * 1024;
thread_local Fiber* current = nullptr;
thread_local ucontext_t scheduler;
thread_local const std::function<void()>* body = nullptr;
thread_local std::exception_ptr failure;
thread_local std::vector<unsigned char> shared;
Schedule g_schedule = Schedule::kForward;
uint64_t g_seed = 0;

void entry() {
  try {
    (*body)();
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  current->state = State::kDone;
  swapcontext(&current->context, &scheduler);
}
void yield(State why) {
  Fiber* self = current;
  self->state = why;
  swapcontext(&self->context, &scheduler);
  if (failure) throw 0;  // unwound by entry(); the first failure wins
}
}  // namespace

void set_schedule(Schedule s, uint64_t seed) {
  g_schedule = s;
  g_seed = seed;
}
void* shared_base() { return shared.data(); }
void fail(const std::string& what) {
  throw std::runtime_error(what + " [block " + std::to_string(blockIdx.x) + "," +
                           std::to_string(blockIdx.y) + " thread " + std::to_string(threadIdx.x) +
                           "," + std::to_string(threadIdx.y) + "]");
}
void sync_block() { yield(State::kBlock); }
std::array<uint64_t, 32> exchange_warp(unsigned mask, uint64_t value) {
  current->mask = mask;
  current->value = value;
  yield(State::kWarp);
  return current->received;
}

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& thread) {
  const size_t n = size_t{block.x} * block.y * block.z;
  if (n == 0 || n > 1024 || !grid.x || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string(name) + ": invalid launch configuration");
  body = &thread;
  failure = nullptr;
  gridDim = grid;
  blockDim = block;
  std::vector<Fiber> fibers(n);
  for (auto& f : fibers) f.stack = std::make_unique<char[]>(kStackBytes);
  std::mt19937_64 rng(g_seed);
  std::vector<size_t> order(n);
  for (unsigned bz = 0; bz < grid.z; ++bz)
    for (unsigned by = 0; by < grid.y; ++by)
      for (unsigned bx = 0; bx < grid.x; ++bx) {
        blockIdx = {bx, by, bz};
        shared.assign(shared_bytes, 0xFF);  // reads as NaN: uninitialised shared memory shows up
        for (size_t i = 0; i < n; ++i) {
          Fiber& f = fibers[i];
          f.state = State::kReady;
          f.tid = {unsigned(i % block.x), unsigned(i / block.x % block.y),
                   unsigned(i / block.x / block.y)};
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get();
          f.context.uc_stack.ss_size = kStackBytes;
          f.context.uc_link = nullptr;
          makecontext(&f.context, entry, 0);
        }
        std::iota(order.begin(), order.end(), 0);
        for (size_t done = 0; done < n;) {
          if (g_schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
          if (g_schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), rng);
          bool progress = false;
          for (size_t i : order) {
            Fiber& f = fibers[i];
            if (f.state != State::kReady) continue;
            current = &f;
            threadIdx = f.tid;
            progress = true;
            swapcontext(&scheduler, &f.context);
            done += f.state == State::kDone;
          }
          if (failure) {  // let waiting fibers unwind, then report the first error
            for (auto& f : fibers)
              if (f.state != State::kDone) f.state = State::kReady;
            if (done < n)
              continue;
            else
              break;
          }
          for (size_t w = 0; w < n; w += 32) {  // release complete warp collectives
            for (size_t i = w; i < std::min(n, w + 32); ++i) {
              Fiber& f = fibers[i];
              if (f.state != State::kWarp) continue;
              bool ready = true;
              for (unsigned l = 0; l < 32 && ready; ++l)
                if (f.mask >> l & 1u)
                  ready = w + l < n && fibers[w + l].state == State::kWarp &&
                          fibers[w + l].mask == f.mask;
              if (!ready) continue;
              const unsigned mask = f.mask;
              std::array<uint64_t, 32> all{};
              for (unsigned l = 0; l < 32; ++l)
                if (mask >> l & 1u) all[l] = fibers[w + l].value;
              for (unsigned l = 0; l < 32; ++l)
                if (mask >> l & 1u) {
                  fibers[w + l].received = all;
                  fibers[w + l].state = State::kReady;
                }
              progress = true;
            }
          }
          const size_t waiting = std::count_if(fibers.begin(), fibers.end(),
                                               [](auto& f) { return f.state == State::kBlock; });
          if (waiting == n) {
            for (auto& f : fibers) f.state = State::kReady;
            progress = true;
          } else if (waiting && waiting + done == n) {
            current = &fibers[0];
            failure = std::make_exception_ptr(std::runtime_error(
                std::string(name) + ": a thread left the block before __syncthreads()"));
          } else if (!progress) {
            failure = std::make_exception_ptr(std::runtime_error(
                std::string(name) + ": deadlock (divergent barrier or warp mask)"));
          }
        }
        if (failure) std::rethrow_exception(failure);
      }
}
}  // namespace mergeme::simt::host
