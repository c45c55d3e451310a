#include "csrc/simt/host/amx.h"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace mergeme::simt::host {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // palette 1

struct Tile {
  int rows, colsb;  // both zero: not a valid operand
  alignas(64) uint8_t data[kRows][kRowBytes];
};

struct State {
  int palette;  // 0: not configured
  int start_row;
  Tile tiles[kTiles];
};

// Of a trivial type, so that the first use in a handler runs no constructor; that use may allocate,
// which is safe here: the signal comes from a tile instruction, never from within malloc.
thread_local State state;

enum Kind {
  kLoadConfig,
  kStoreConfig,
  kRelease,
  kZero,
  kLoad,
  kLoadT1,
  kStore,
  kDotBf16,
  kDotFp16,
  kKinds
};
constexpr std::array<const char*, kKinds> kNames = {"ldtilecfg",  "sttilecfg", "tilerelease",
                                                    "tilezero",   "tileloadd", "tileloaddt1",
                                                    "tilestored", "tdpbf16ps", "tdpfp16ps"};
std::array<std::atomic<uint64_t>, kKinds> counts;

// ---- decoding: SDM volume 2, 2.1 (ModR/M, SIB) and 2.3 (VEX)

struct Instruction {
  Kind kind;
  int reg, rm, third;  // tiles: ModRM.reg, ModRM.r/m, VEX.vvvv
  uint8_t* memory;     // base + displacement; for a tile load or store without the index
  int64_t stride;      // index << scale
  int length;
};

enum Pp { kNone = 0, k66 = 1, kF3 = 2, kF2 = 3 };

// The registers in the order of their numbers.
int64_t general_register(const ucontext_t& context, int number) {
  static constexpr int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                      REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                      REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

int64_t read_displacement(const uint8_t*& at, int bytes) {
  int32_t wide = 0;
  if (bytes == 1) {
    wide = static_cast<int8_t>(*at);
  } else if (bytes == 4) {
    memcpy(&wide, at, sizeof wide);
  }
  at += bytes;
  return wide;
}

// False if it is not one of ours, or is one in a form that does not exist. Reads no byte beyond
// what the instruction so far says it has.
bool decode(const ucontext_t& context, Instruction& out) {
  const auto* const start = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  const uint8_t* at = start;
  if (*at++ != 0xC4) return false;  // three-byte VEX: no shorter form reaches the map 0F 38
  const uint8_t first = *at++, second = *at++;
  const bool r = !(first & 0x80), x = !(first & 0x40), b = !(first & 0x20);
  const int vvvv = ~second >> 3 & 15, pp = second & 3;
  if ((first & 31) != 2 || (second & 0x84) != 0) return false;  // map 0F 38, W 0, L 0
  const uint8_t opcode = *at++;
  if (opcode != 0x49 && opcode != 0x4B && opcode != 0x5C) return false;
  const uint8_t modrm = *at++;
  const int mod = modrm >> 6, rm = modrm & 7;
  out = {};
  out.reg = modrm >> 3 & 7;
  out.rm = rm;
  out.third = vvvv;

  if (opcode == 0x5C) {
    if (mod != 3 || r || b || vvvv > 7 || (pp != kF3 && pp != kF2)) return false;
    out.kind = pp == kF3 ? kDotBf16 : kDotFp16;
  } else if (vvvv != 0 || r) {
    return false;
  } else if (opcode == 0x4B) {
    if (mod == 3 || rm != 4 || pp == kNone) return false;
    out.kind = pp == kF2 ? kLoad : pp == k66 ? kLoadT1 : kStore;
  } else if (mod == 3) {
    if (pp == kF2 && rm == 0 && !b)
      out.kind = kZero;
    else if (pp == kNone && modrm == 0xC0 && !b)
      out.kind = kRelease;
    else
      return false;
  } else {
    if (out.reg != 0 || (pp != kNone && pp != k66)) return false;
    out.kind = pp == kNone ? kLoadConfig : kStoreConfig;
  }

  if (mod != 3) {
    int base = rm | b << 3, index = 4, scale = 0;  // index 4: none
    if (rm == 4) {
      const uint8_t sib = *at++;
      base = (sib & 7) | b << 3;
      index = (sib >> 3 & 7) | x << 3;
      scale = sib >> 6;
    }
    const bool no_base = mod == 0 && (base & 7) == 5;
    int64_t address = read_displacement(at, mod == 1 ? 1 : mod == 2 || no_base ? 4 : 0);
    if (!no_base)
      address += general_register(context, base);
    else if (rm == 5)
      address += reinterpret_cast<int64_t>(at);  // relative to the next instruction
    out.stride = index == 4 ? 0 : general_register(context, index) << scale;
    if (opcode == 0x49) address += out.stride;
    out.memory = reinterpret_cast<uint8_t*>(address);
  }
  out.length = static_cast<int>(at - start);
  return true;
}

// ---- what each does: the operation sections of volume 2

struct Fault {
  int signal = 0;  // SIGILL for #UD, SIGSEGV for #GP
  char reason[160];
};

__attribute__((format(printf, 3, 4))) void set(Fault& fault, int signal, const char* format, ...) {
  fault.signal = signal;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fault.reason, sizeof fault.reason, format, arguments);
  va_end(arguments);
}

void load_config(const uint8_t* from, Fault& fault) {
  uint8_t bytes[64];
  memcpy(bytes, from, sizeof bytes);
  State next{.palette = bytes[0], .start_row = bytes[1], .tiles = {}};
  if (next.palette > 1) return set(fault, SIGSEGV, "palette %d does not exist", next.palette);
  if (next.palette == 0) {
    state = {};
    return;
  }
  for (int i = 2; i < 64; ++i)
    if ((i < 16 || (i >= 16 + 2 * kTiles && i < 48) || i >= 48 + kTiles) && bytes[i] != 0)
      return set(fault, SIGSEGV, "byte %d is reserved and holds %d", i, bytes[i]);
  for (int i = 0; i < kTiles; ++i) {
    Tile& tile = next.tiles[i];
    tile.colsb = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tile.rows = bytes[48 + i];
    if (tile.colsb > kRowBytes || tile.rows > kRows || (tile.colsb == 0) != (tile.rows == 0))
      return set(fault, SIGSEGV, "tmm%d cannot have %d rows of %d bytes", i, tile.rows, tile.colsb);
  }
  state = next;
}

void store_config(uint8_t* to) {
  uint8_t bytes[64] = {};
  if (state.palette != 0) {
    bytes[0] = static_cast<uint8_t>(state.palette);
    bytes[1] = static_cast<uint8_t>(state.start_row);
    for (int i = 0; i < kTiles; ++i) {
      bytes[16 + 2 * i] = static_cast<uint8_t>(state.tiles[i].colsb);
      bytes[48 + i] = static_cast<uint8_t>(state.tiles[i].rows);
    }
  }
  memcpy(to, bytes, sizeof bytes);
}

// A load goes on at start_row, where a page fault had stopped it.
void load(Tile& tile, const uint8_t* from, int64_t stride) {
  for (int row = state.start_row; row < kRows; ++row) {
    memset(tile.data[row], 0, kRowBytes);
    if (row < tile.rows) memcpy(tile.data[row], from + row * stride, size_t(tile.colsb));
  }
  state.start_row = 0;
}

void store(const Tile& tile, uint8_t* to, int64_t stride) {
  for (int row = state.start_row; row < tile.rows; ++row)
    memcpy(to + row * stride, tile.data[row], size_t(tile.colsb));
  state.start_row = 0;
}

void check_dot(const Instruction& in, Fault& fault) {
  const Tile &d = state.tiles[in.reg], &a = state.tiles[in.rm], &b = state.tiles[in.third];
  if (in.reg == in.rm || in.reg == in.third || in.rm == in.third)
    set(fault, SIGILL, "its three tiles must differ");
  else if (d.colsb % 4 != 0 || a.colsb % 4 != 0 || b.colsb % 4 != 0)
    set(fault, SIGILL, "rows of %d, %d and %d bytes are not all multiples of 4", d.colsb, a.colsb,
        b.colsb);
  else if (d.rows != a.rows || d.colsb != b.colsb || a.colsb / 4 != b.rows)
    set(fault, SIGILL, "shapes (rows, bytes) (%d, %d) += (%d, %d) x (%d, %d) do not fit", d.rows,
        d.colsb, a.rows, a.colsb, b.rows, b.colsb);
}

struct Pair {
  float even, odd;
};

__attribute__((target("avx2,fma,f16c"))) inline Pair widen(const uint8_t* at, Kind kind) {
  uint32_t bits;
  memcpy(&bits, at, sizeof bits);
  if (kind == kDotFp16)  // exact, subnormal numbers included
    return {_cvtsh_ss(static_cast<uint16_t>(bits)), _cvtsh_ss(static_cast<uint16_t>(bits >> 16))};
  const uint32_t low = bits << 16, high = bits & 0xffff0000u;
  Pair pair;
  memcpy(&pair.even, &low, sizeof low);
  memcpy(&pair.odd, &high, sizeof high);
  return pair;
}

// Fused multiply-adds of each half of the pairs, from zero and in the order of k; the two sums are
// then added, and that to the tile. Called with MXCSR set to flush and to read denormals as zero,
// so that the processor's own instructions round as the manual says; not inlined, so that none of
// them can move before that.
__attribute__((target("avx2,fma,f16c"), noinline)) void dot(const Instruction& in) {
  constexpr int kColumns = kRowBytes / 4, kLanes = 8;
  Tile& d = state.tiles[in.reg];
  const Tile &a = state.tiles[in.rm], &b = state.tiles[in.third];
  alignas(32) float b_even[kRows][kColumns], b_odd[kRows][kColumns];
  const int depth = a.colsb / 4;
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < kColumns; ++n) {
      const Pair pair = widen(b.data[k] + 4 * n, in.kind);
      b_even[k][n] = pair.even;
      b_odd[k][n] = pair.odd;
    }
  for (int m = 0; m < d.rows; ++m) {
    for (int n = 0; n < kColumns; n += kLanes) {
      __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
      for (int k = 0; k < depth; ++k) {
        const Pair pair = widen(a.data[m] + 4 * k, in.kind);
        even = _mm256_fmadd_ps(_mm256_set1_ps(pair.even), _mm256_load_ps(b_even[k] + n), even);
        odd = _mm256_fmadd_ps(_mm256_set1_ps(pair.odd), _mm256_load_ps(b_odd[k] + n), odd);
      }
      auto* at = reinterpret_cast<float*>(d.data[m] + 4 * n);
      _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_add_ps(even, odd)));
    }
    memset(d.data[m] + d.colsb, 0, size_t(kRowBytes - d.colsb));
  }
  for (int m = d.rows; m < kRows; ++m) memset(d.data[m], 0, kRowBytes);
  state.start_row = 0;
}

void execute(const Instruction& in, Fault& fault) {
  if (in.kind == kLoadConfig) return load_config(in.memory, fault);
  if (in.kind == kStoreConfig) return store_config(in.memory);
  if (in.kind == kRelease) {
    state = {};
    return;
  }
  if (state.palette == 0) return set(fault, SIGILL, "the tiles are not configured");
  const bool is_dot = in.kind == kDotBf16 || in.kind == kDotFp16;
  for (const int i : {in.reg, is_dot ? in.rm : in.reg, is_dot ? in.third : in.reg})
    if (state.tiles[i].rows == 0) return set(fault, SIGILL, "tmm%d is configured with no rows", i);
  Tile& tile = state.tiles[in.reg];
  if (is_dot) {
    check_dot(in, fault);
    if (fault.signal == 0) dot(in);
  } else if (in.kind == kZero) {
    memset(tile.data, 0, sizeof tile.data);
    state.start_row = 0;
  } else if (in.kind == kStore) {
    store(tile, in.memory, in.stride);
  } else {
    load(tile, in.memory, in.stride);
  }
}

// ---- the handler

std::mutex installing;
bool installed = false;
struct sigaction previous;

void pass_on(int signal, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO)
    previous.sa_sigaction(signal, info, context);
  else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN)
    ::signal(signal, SIG_DFL);  // the instruction is met again, and ends the process
  else
    previous.sa_handler(signal);
}

void report(const Instruction& in, const Fault& fault) {
  char line[256];
  const int length =
      snprintf(line, sizeof line, "mergeme: emulated %s (tmm%d): %s (%s)\n", kNames[in.kind],
               in.reg, fault.reason, fault.signal == SIGILL ? "#UD" : "#GP");
  if (write(STDERR_FILENO, line, static_cast<size_t>(length)) < 0) return;
}

void handle(int signal, siginfo_t* info, void* raw) {
  const int error = errno;
  auto& context = *static_cast<ucontext_t*>(raw);
  Instruction in;
  if (!decode(context, in)) return pass_on(signal, info, raw);
  const unsigned saved = _mm_getcsr();
  constexpr unsigned kDefault = 0x1f80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  _mm_setcsr(kDefault | kFlushToZero | kDenormalsAreZero);
  Fault fault;
  execute(in, fault);
  _mm_setcsr(saved);
  if (fault.signal == 0) {
    counts[in.kind].fetch_add(1, std::memory_order_relaxed);
    context.uc_mcontext.gregs[REG_RIP] += in.length;
  } else {
    report(in, fault);
    if (fault.signal == SIGILL)
      pass_on(signal, info, raw);
    else
      raise(fault.signal);
  }
  errno = error;
}

}  // namespace

void emulate_amx(bool on) {
  const std::lock_guard lock(installing);
  if (on == installed) return;
  if (on) {
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
        !__builtin_cpu_supports("avx2"))
      throw std::runtime_error("emulate_amx: needs a processor with AVX2, FMA and F16C");
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &previous);
  } else {
    struct sigaction current;
    sigaction(SIGILL, nullptr, &current);
    if (!(current.sa_flags & SA_SIGINFO) || current.sa_sigaction != handle)
      throw std::runtime_error("emulate_amx: another handler of SIGILL was put over this one");
    sigaction(SIGILL, &previous, nullptr);
  }
  installed = on;
}

std::map<std::string, uint64_t> emulated_amx_instructions() {
  std::map<std::string, uint64_t> by_name;
  for (int kind = 0; kind < kKinds; ++kind) by_name[kNames[size_t(kind)]] = counts[size_t(kind)];
  return by_name;
}

}  // namespace mergeme::simt::host

#else

namespace mergeme::simt::host {

void emulate_amx(bool) { throw std::runtime_error("emulate_amx: for Linux on x86-64 only"); }
std::map<std::string, uint64_t> emulated_amx_instructions() { return {}; }

}  // namespace mergeme::simt::host
#endif
