// Which instruction set the CPU half runs with. Torch-free.
//
// An op's cpu_loops.cpp is compiled once per vector width (portable, avx2, avx512) and its
// cpu_matrix.cpp, if it has one, also for the sets that differ in matrix products only
// (avx512_bf16, amx). Each time MERGEME_ISA is the set's name, and the file defines its functions
// in namespace mergeme::<op>::MERGEME_ISA. The header beside it declares them with
// MERGEME_DECLARE_LOOPS or MERGEME_DECLARE_MATRIX, and cpu.cpp calls them with MERGEME_CALL_LOOPS
// or MERGEME_CALL_MATRIX.
#pragma once
#include <string>

namespace mergeme {

// Each set includes those before it.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The instruction set in use: the fastest of those the processor and the system offer, unless the
// environment variable MERGEME_CPU_ISA names another of them. With MERGEME_CPU_ISA_UNCHECKED=1 any
// name is taken on trust: for virtual machines that hide what their processor can do, and for
// tests under an emulator. Read once.
Isa chosen_isa();
// The chosen one's name, and all that this machine could run, comma-separated.
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
  (::mergeme::chosen_isa() >= ::mergeme::Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
   : ::mergeme::chosen_isa() == ::mergeme::Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                                      : portable::function(__VA_ARGS__))
#define MERGEME_DECLARE_MATRIX(...)  \
  MERGEME_DECLARE_LOOPS(__VA_ARGS__) \
  namespace avx512_bf16 {            \
  __VA_ARGS__                        \
  }                                  \
  namespace amx {                    \
  __VA_ARGS__                        \
  }
#define MERGEME_CALL_MATRIX(function, ...)                                      \
  (::mergeme::chosen_isa() == ::mergeme::Isa::kAmx ? amx::function(__VA_ARGS__) \
   : ::mergeme::chosen_isa() == ::mergeme::Isa::kAvx512Bf16                     \
       ? avx512_bf16::function(__VA_ARGS__)                                     \
       : MERGEME_CALL_LOOPS(function, __VA_ARGS__))
#else
#define MERGEME_DECLARE_LOOPS(...) \
  namespace portable {             \
  __VA_ARGS__                      \
  }
#define MERGEME_CALL_LOOPS(function, ...) portable::function(__VA_ARGS__)
#define MERGEME_DECLARE_MATRIX(...) MERGEME_DECLARE_LOOPS(__VA_ARGS__)
#define MERGEME_CALL_MATRIX(function, ...) MERGEME_CALL_LOOPS(function, __VA_ARGS__)
#endif
