// Which instruction set the CPU loops run with. Torch-free.
//
// An op's cpu_loops.cpp is compiled once per instruction set, each time with MERGEME_ISA set to its
// name, and defines its functions in namespace mergeme::<op>::MERGEME_ISA. Its cpu_loops.h declares
// them with MERGEME_DECLARE_LOOPS, and cpu.cpp calls them with MERGEME_CALL_LOOPS.
#pragma once
#include <string>

namespace mergeme {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The instruction set in use: the best the processor reports, unless the environment variable
// MERGEME_CPU_ISA (portable, avx2 or avx512) asks for a lesser one. Read once.
Isa chosen_isa();
// The chosen one's name, and all that this processor could run, comma-separated.
const char* chosen_isa_name();
std::string available_isas();

}  // namespace mergeme

#if defined(__x86_64__)
#define MERGEME_DECLARE_LOOPS(...) \
  namespace portable {             \
  __VA_ARGS__                      \
  }                                \
  namespace avx2 {                 \
  __VA_ARGS__                      \
  }                                \
  namespace avx512 {               \
  __VA_ARGS__                      \
  }
#define MERGEME_CALL_LOOPS(function, ...)                                             \
  (::mergeme::chosen_isa() == ::mergeme::Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
   : ::mergeme::chosen_isa() == ::mergeme::Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                                      : portable::function(__VA_ARGS__))
#else
#define MERGEME_DECLARE_LOOPS(...) \
  namespace portable {             \
  __VA_ARGS__                      \
  }
#define MERGEME_CALL_LOOPS(function, ...) portable::function(__VA_ARGS__)
#endif
