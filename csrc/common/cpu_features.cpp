#include "csrc/common/cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace mergeme {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Isa choose() {
  const char* asked = std::getenv("MERGEME_CPU_ISA");
  const std::string wanted = asked ? asked : "";
  if (wanted == "portable") return Isa::kPortable;
  if (wanted == "avx2" && has_avx2()) return Isa::kAvx2;
  if (wanted == "avx512" && has_avx512()) return Isa::kAvx512;
  if (!wanted.empty())
    throw std::runtime_error("MERGEME_CPU_ISA: expected one of " + available_isas() + ", got " +
                             wanted);
  return has_avx512() ? Isa::kAvx512 : has_avx2() ? Isa::kAvx2 : Isa::kPortable;
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* chosen_isa_name() {
  switch (chosen_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

std::string available_isas() {
  std::string all = "portable";
  if (has_avx2()) all += ", avx2";
  if (has_avx512()) all += ", avx512";
  return all;
}

}  // namespace mergeme
