// A call stack that can be left and resumed. Test-only.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(MERGEME_SIMT_UCONTEXT)
#define MERGEME_SIMT_UCONTEXT  // portable, and two system calls slower at every switch
#endif
#if defined(MERGEME_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace mergeme::simt::host {

class Fiber {
 public:
  Fiber() = default;  // stands for the stack that is already running
  // A stack of its own, on which the first switch calls `entry`, which never returns. `color` sets
  // the stacks' tops apart, lest they all fall into the same cache sets.
  Fiber(void (*entry)(), size_t color);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves this fiber, which must be the running one, for `next`; returns when it is resumed.
  void switch_to(Fiber& next);
  // Forgets what the stack was doing, without unwinding it: the next switch calls `entry` again.
  void reset();
  // Must be the first thing `entry` does.
  static void started();

 private:
  void (*entry_)() = nullptr;
  char* map_ = nullptr;  // guard page, then the stack
  char* top_ = nullptr;
#if defined(MERGEME_SIMT_UCONTEXT)
  ucontext_t context_{};
#else
  void* sp_ = nullptr;
#endif
  // For AddressSanitizer, which must know which stack is in use.
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace mergeme::simt::host
