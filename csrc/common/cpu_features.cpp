#include "csrc/common/cpu_features.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mergeme {
namespace {

constexpr std::array<const char*, 5> kNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux saves the tiles of a process only after it has asked for room for them (8 KB a thread);
// before that, and on a system that knows no tiles, a tile instruction is illegal. The permission
// is the whole process's, threads to come included, and asking twice does no harm.
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The processor has them (leaf 7), the system switches their state (XCR0), and it grants us that.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  // XGETBV is there: AVX was found above, and that takes the system's word in CPUID.
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;  // configuration and data
  return (low & kTileState) == kTileState && ask_for_tiles();
}

// VDPBF16PS does two multiply-adds a lane. AMD's (Zen 4 on) issues as often as an fp32 FMA and so
// doubles the rate; Intel's issues at a quarter of that and halves it (measured on a server core:
// 86 GF/s against 176), so there converting to fp32 is the faster way.
bool dot_products_pay() { return __builtin_cpu_is("amd"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
bool ask_for_tiles() { return false; }
bool dot_products_pay() { return false; }
#endif

bool offered(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return has_avx2();
    case Isa::kAvx512:
      return has_avx512();
    case Isa::kAvx512Bf16:
      return has_avx512_bf16();
    default:
      return has_amx();
  }
}

bool unchecked() {
  const char* asked = std::getenv("MERGEME_CPU_ISA_UNCHECKED");
  const std::string_view wanted = asked ? asked : "";
  if (wanted == "1") return true;
  if (wanted.empty() || wanted == "0") return false;
  throw std::runtime_error("MERGEME_CPU_ISA_UNCHECKED: expected 0 or 1, got " +
                           std::string(wanted));
}

Isa choose() {
  const bool trusted = unchecked();
  const char* asked = std::getenv("MERGEME_CPU_ISA");
  const std::string wanted = asked ? asked : "";
  if (!wanted.empty()) {
    for (size_t i = 0; i < kNames.size(); ++i) {
      const Isa isa = static_cast<Isa>(i);
      if (wanted != kNames[i]) continue;
      if (trusted && isa == Isa::kAmx) ask_for_tiles();
      if (trusted || offered(isa)) return isa;
      throw std::runtime_error("MERGEME_CPU_ISA: expected one of " + available_isas() + ", got " +
                               wanted + ", which this machine does not report; " +
                               "MERGEME_CPU_ISA_UNCHECKED=1 would run it all the same");
    }
    throw std::runtime_error("MERGEME_CPU_ISA: expected one of " + available_isas() + ", got " +
                             wanted);
  }
  if (has_amx()) return Isa::kAmx;
  if (has_avx512_bf16() && dot_products_pay()) return Isa::kAvx512Bf16;
  return has_avx512() ? Isa::kAvx512 : has_avx2() ? Isa::kAvx2 : Isa::kPortable;
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* chosen_isa_name() { return kNames[static_cast<size_t>(chosen_isa())]; }

std::string available_isas() {
  std::string all;
  for (size_t i = 0; i < kNames.size(); ++i)
    if (offered(static_cast<Isa>(i))) all += (all.empty() ? "" : ", ") + std::string(kNames[i]);
  return all;
}

}  // namespace mergeme
