#include "csrc/simt/host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(MERGEME_SIMT_UCONTEXT)
// Saves the registers that a call preserves, stores the stack pointer in *save and continues on the
// stack `load`. Rounding and exception modes are not saved: kernels do not change them.
extern "C" __attribute__((visibility("hidden"))) void mergeme_simt_switch(void** save, void* load);
asm(R"(
  .text
  .globl mergeme_simt_switch
  .hidden mergeme_simt_switch
  .type mergeme_simt_switch, @function
mergeme_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mergeme_simt_switch, .-mergeme_simt_switch
)");
#endif

namespace mergeme::simt::host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // address space; only touched pages cost memory

Fiber* left = nullptr;  // the fiber of the last switch_to

}  // namespace

Fiber::Fiber(void (*entry)(), size_t color) : entry_(entry) {
  const size_t guard = sysconf(_SC_PAGESIZE);
  void* map = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  map_ = static_cast<char*>(map);
  mprotect(map_, guard, PROT_NONE);  // an overflow ends the process instead of hitting a neighbour
  bottom_ = map_ + guard;
  size_ = kStackBytes;
  top_ = map_ + guard + kStackBytes - color * 320 % 4096 / 64 * 64;
  reset();
}

Fiber::~Fiber() {
  if (map_ != nullptr) munmap(map_, sysconf(_SC_PAGESIZE) + kStackBytes);
}

void Fiber::reset() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);
  fake_stack_ = nullptr;
#endif
#if defined(MERGEME_SIMT_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = const_cast<void*>(bottom_);
  context_.uc_stack.ss_size = static_cast<size_t>(top_ - static_cast<const char*>(bottom_));
  context_.uc_link = nullptr;
  makecontext(&context_, entry_, 0);
#else
  // What mergeme_simt_switch pops: six registers, zero so that backtraces end here, and the address
  // to return to; then a null return address for `entry`, which finds the stack as after a call.
  auto* words = reinterpret_cast<uintptr_t*>(top_) - 8;
  for (int i = 0; i < 8; ++i) words[i] = 0;
  words[6] = reinterpret_cast<uintptr_t>(entry_);
  sp_ = words;
#endif
}

void Fiber::switch_to(Fiber& next) {
  left = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
#if defined(MERGEME_SIMT_UCONTEXT)
  swapcontext(&context_, &next.context_);
#else
  mergeme_simt_switch(&sp_, next.sp_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::started() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom_, &left->size_);
#endif
}

}  // namespace mergeme::simt::host
