// Runs lists of tile instructions for python_tests/simt/test_amx.py, each one a real instruction of
// this file's machine code: every tile, every combination of three, and every form of address.
#include <array>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "csrc/simt/host/amx.h"

namespace mergeme::simt::host {

#if defined(__x86_64__)
namespace {

using Move = void (*)(unsigned char*, int64_t);

template <size_t kTile>
void load(unsigned char* at, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(kTile) : "memory");
}
template <size_t kTile>
void load_t1(unsigned char* at, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(kTile) : "memory");
}
template <size_t kTile>
void store(unsigned char* at, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(kTile) : "memory");
}
template <size_t kTile>
void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// As the manual writes them: destination, first and second source in the digits of kTiles. Where
// the assembler refuses (tiles that are the same) or is too old (for fp16), the bytes.
template <size_t kTiles, int kPrefix>
void dot_bytes() {
  __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~kTiles & 7) << 3 | 0x40 | kPrefix),
                   "i"(0xc0 | (kTiles >> 6) << 3 | (kTiles >> 3 & 7)));
}
template <size_t kTiles>
void dot_bf16() {
  constexpr size_t d = kTiles >> 6, a = kTiles >> 3 & 7, b = kTiles & 7;
  if constexpr (d != a && d != b && a != b)
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(d), "i"(a), "i"(b));
  else
    dot_bytes<kTiles, 2>();
}
template <size_t kTiles>
void dot_fp16() {
  dot_bytes<kTiles, 3>();
}

template <size_t... kTile>
constexpr std::array<Move, 8> make_loads(std::index_sequence<kTile...>) {
  return {load<kTile>...};
}
template <size_t... kTile>
constexpr std::array<Move, 8> make_loads_t1(std::index_sequence<kTile...>) {
  return {load_t1<kTile>...};
}
template <size_t... kTile>
constexpr std::array<Move, 8> make_stores(std::index_sequence<kTile...>) {
  return {store<kTile>...};
}
template <size_t... kTile>
constexpr std::array<void (*)(), 8> make_zeros(std::index_sequence<kTile...>) {
  return {zero<kTile>...};
}
template <size_t... kTiles>
constexpr std::array<void (*)(), 512> make_dots_bf16(std::index_sequence<kTiles...>) {
  return {dot_bf16<kTiles>...};
}
template <size_t... kTiles>
constexpr std::array<void (*)(), 512> make_dots_fp16(std::index_sequence<kTiles...>) {
  return {dot_fp16<kTiles>...};
}
constexpr auto kLoads = make_loads(std::make_index_sequence<8>{});
constexpr auto kLoadsT1 = make_loads_t1(std::make_index_sequence<8>{});
constexpr auto kStores = make_stores(std::make_index_sequence<8>{});
constexpr auto kZeros = make_zeros(std::make_index_sequence<8>{});
constexpr auto kDotsBf16 = make_dots_bf16(std::make_index_sequence<512>{});
constexpr auto kDotsFp16 = make_dots_fp16(std::make_index_sequence<512>{});

// Loads tmm3 from `at` with the given registers, scale and displacement.
#define MERGEME_ADDRESS(base, index, scale, displacement)                                      \
  [](unsigned char* at, int64_t stride) {                                                      \
    __asm__ volatile("mov %0, %%" base "\n\tmov %1, %%" index "\n\ttileloadd " #displacement   \
                     "(%%" base ",%%" index "," #scale "), %%tmm3" ::"r"(at - (displacement)), \
                     "r"(stride / (scale))                                                     \
                     : base, index, "memory");                                                 \
  }
constexpr Move kAddresses[] = {
    MERGEME_ADDRESS("rax", "rcx", 1, 0),
    MERGEME_ADDRESS("rbx", "rdx", 2, 0x40),
    MERGEME_ADDRESS("rcx", "rbx", 4, -0x80),
    MERGEME_ADDRESS("rdx", "r9", 8, 0x12345),
    MERGEME_ADDRESS("rsi", "r12", 1, -0x12345),
    MERGEME_ADDRESS("rdi", "rax", 2, 0),
    MERGEME_ADDRESS("r8", "r13", 4, 0x7f),
    MERGEME_ADDRESS("r9", "rdi", 8, 0),
    MERGEME_ADDRESS("r10", "r11", 1, 0x80),
    MERGEME_ADDRESS("r11", "r8", 2, 0),
    MERGEME_ADDRESS("r12", "r15", 4, 0),
    MERGEME_ADDRESS("r13", "rsi", 8, 0),
    MERGEME_ADDRESS("r14", "r10", 1, -1),
    MERGEME_ADDRESS("r15", "r14", 2, 0x1000),
    // rbp and rsp belong to the compiler: put back at once. The stack's tile is a copy, as a signal
    // is handled below rsp.
    [](unsigned char* at, int64_t stride) {
      __asm__ volatile(
          "mov %0, %%rcx\n\tmov %1, %%rdx\n\tmov %%rbp, %%r11\n\tmov %%rcx, %%rbp\n\t"
          "tileloadd (%%rbp,%%rdx,1), %%tmm3\n\tmov %%r11, %%rbp" ::"r"(at),
          "r"(stride)
          : "rcx", "rdx", "r11", "memory");
    },
    [](unsigned char* at, int64_t stride) {
      __asm__ volatile(
          "mov %0, %%rsi\n\tmov %1, %%rdx\n\tmov %%rsp, %%r11\n\tsub $4096, %%rsp\n\t"
          "lea 64(%%rsp), %%rdi\n\tmov $2048, %%rcx\n\trep movsb\n\t"
          "tileloadd 64(%%rsp,%%rdx,1), %%tmm3\n\tmov %%r11, %%rsp" ::"r"(at),
          "r"(stride)
          : "rcx", "rdx", "rsi", "rdi", "r11", "memory");
    },
    // No index: every row is the first.
    [](unsigned char* at, int64_t) {
      __asm__ volatile("tileloadd 16(%0), %%tmm3" ::"r"(at - 16) : "memory");
    },
    // No base: row 1, where this must start, lies at the stride itself.
    [](unsigned char* at, int64_t) {
      __asm__ volatile("tileloadd 0(,%0,1), %%tmm3" ::"r"(at) : "memory");
    },
};
#undef MERGEME_ADDRESS

alignas(64) constexpr unsigned char kConfig[64] = {
    1, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 16};

void run(const AmxStep& step, unsigned char* memory) {
  const auto operand = [&](size_t i) { return step.operands.at(i); };
  const auto tile = [&](size_t i) { return static_cast<size_t>(operand(i)); };
  const auto dots = [&](const std::array<void (*)(), 512>& all) {
    all.at(tile(0) << 6 | tile(1) << 3 | tile(2))();
  };
  const std::string& name = step.instruction;
  if (name == "ldtilecfg")
    __asm__ volatile("ldtilecfg (%0)" ::"r"(memory + operand(0)) : "memory");
  else if (name == "ldtilecfg indexed")
    __asm__ volatile("ldtilecfg -8(%0,%1,8)" ::"r"(memory + 8), "r"(operand(0) / 8) : "memory");
  else if (name == "ldtilecfg constant")  // relative to the instruction pointer
    __asm__ volatile("ldtilecfg %0" ::"m"(kConfig));
  else if (name == "sttilecfg")
    __asm__ volatile("sttilecfg (%0)" ::"r"(memory + operand(0)) : "memory");
  else if (name == "sttilecfg indexed")
    __asm__ volatile("sttilecfg 0x100(%0,%1,2)" ::"r"(memory - 0x100), "r"(operand(0) / 2)
                     : "memory");
  else if (name == "tilerelease")
    __asm__ volatile("tilerelease");
  else if (name == "tilezero")
    kZeros.at(tile(0))();
  else if (name == "tileloadd")
    kLoads.at(tile(0))(memory + operand(1), operand(2));
  else if (name == "tileloaddt1")
    kLoadsT1.at(tile(0))(memory + operand(1), operand(2));
  else if (name == "tilestored")
    kStores.at(tile(0))(memory + operand(1), operand(2));
  else if (name == "tileloadd address")
    kAddresses[operand(0)](memory + operand(1), operand(2));
  else if (name == "tdpbf16ps")
    dots(kDotsBf16);
  else if (name == "tdpfp16ps")
    dots(kDotsFp16);
  else if (name == "tdpbssd")  // not emulated
    __asm__ volatile("tdpbssd %tmm2, %tmm1, %tmm0");
  else if (name == "ud2")
    __asm__ volatile("ud2");
  else if (name == "set mxcsr")
    __builtin_ia32_ldmxcsr(static_cast<unsigned>(operand(0)));
  else if (name == "get mxcsr") {
    const unsigned csr = __builtin_ia32_stmxcsr();
    memcpy(memory + operand(0), &csr, sizeof csr);
  } else
    throw std::invalid_argument("run_amx_program: expected an instruction's name, got " + name);
}

}  // namespace

std::vector<unsigned char> run_amx_program(const std::vector<AmxStep>& program,
                                           const std::vector<unsigned char>& memory) {
  std::vector<unsigned char> copy = memory;
  for (const AmxStep& step : program) run(step, copy.data());
  return copy;
}

#else

std::vector<unsigned char> run_amx_program(const std::vector<AmxStep>&,
                                           const std::vector<unsigned char>&) {
  throw std::runtime_error("run_amx_program: for x86-64 only");
}
#endif

}  // namespace mergeme::simt::host
