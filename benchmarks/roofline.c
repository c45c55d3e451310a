// What one core of this machine can do at most: multiply-adds from registers, bytes read from
// memory. Compiled by roofline.py for the processor at hand; every function returns a rate.

#include <stddef.h>
#include <stdint.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#endif

#if defined(__x86_64__)
#define KEEP(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define KEEP(x) __asm__ volatile("" : "+w"(x))
#else
#define KEEP(x) (void)0
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define CHAINS 16
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define CHAINS 10
#else
#define VECTOR_BYTES 16
#define CHAINS 10
#endif

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t vint __attribute__((vector_size(VECTOR_BYTES)));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Enough independent chains to hide the latency; KEEP stops them being folded. The
// loops over chains are unrolled so that the sums live in registers.
double fma_rate(double seconds) {
  vfloat sum[CHAINS], a, b;
#pragma GCC unroll 16
  for (int i = 0; i < CHAINS; ++i) sum[i] = (vfloat){0} + (float)i;
  a = (vfloat){0} + 0.999f;
  b = (vfloat){0} + 0.001f;
  const int64_t rounds = 20000;
  int64_t done = 0;
  const double begin = now();
  double end = begin;
  while (end - begin < seconds) {
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < CHAINS; ++i) {
        sum[i] = sum[i] * a + b;
        KEEP(sum[i]);
      }
    }
    done += rounds;
    end = now();
  }
  return done * (double)CHAINS * (VECTOR_BYTES / 4) * 2 / (end - begin);
}

// One core reads fastest with some number of streams that depends on its prefetchers: all are
// tried.
#define READ_RATE(STREAMS)                                            \
  static double read_rate_##STREAMS(const void* data, size_t bytes) { \
    const size_t steps = bytes / STREAMS / VECTOR_BYTES;              \
    const vint* p[STREAMS];                                           \
    vint sum[STREAMS];                                                \
    _Pragma("GCC unroll 8") for (int s = 0; s < STREAMS; ++s) {       \
      p[s] = (const vint*)data + s * steps;                           \
      sum[s] = (vint){0};                                             \
    }                                                                 \
    const double begin = now();                                       \
    for (size_t i = 0; i < steps; ++i) {                              \
      _Pragma("GCC unroll 8") for (int s = 0; s < STREAMS; ++s) {     \
        sum[s] ^= p[s][i];                                            \
        KEEP(sum[s]);                                                 \
      }                                                               \
    }                                                                 \
    return (double)STREAMS * steps * VECTOR_BYTES / (now() - begin);  \
  }

READ_RATE(1)
READ_RATE(2)
READ_RATE(4)
READ_RATE(8)

// `data` is aligned to a cache line, `bytes` a multiple of 512.
double read_rate(const void* data, size_t bytes, int streams) {
  switch (streams) {
    case 1:
      return read_rate_1(data, bytes);
    case 2:
      return read_rate_2(data, bytes);
    case 4:
      return read_rate_4(data, bytes);
    default:
      return read_rate_8(data, bytes);
  }
}

#if defined(__x86_64__)

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static double dot_bf16(
    double seconds) {
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
  __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  const int64_t rounds = 20000;
  int64_t done = 0;
  const double begin = now();
  double end = begin;
  do {
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        sum[i] = _mm512_dpbf16_ps(sum[i], a, a);
        KEEP(sum[i]);
      }
    }
    done += rounds;
    end = now();
  } while (end - begin < seconds);
  return done * 16.0 * 32 * 2 / (end - begin);
}

struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

__attribute__((target("amx-tile,amx-bf16"))) static double dot_tile(double seconds) {
  // Linux lends the tile state to a process that asks for it.
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;
  struct tile_config config = {.palette = 1};
  for (int t = 0; t < 8; ++t) {
    config.colsb[t] = 64;
    config.rows[t] = 16;
  }
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  const int64_t rounds = 20000;
  int64_t done = 0;
  const double begin = now();
  double end = begin;
  do {
    for (int64_t r = 0; r < rounds; ++r) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    done += rounds;
    end = now();
  } while (end - begin < seconds);
  _tile_release();
  return done * 4.0 * 16 * 16 * 32 * 2 / (end - begin);
}

typedef double probe(double);

// Tried in a child first: what the processor lacks ends the child, not us.
static double if_it_runs(probe* function, double seconds) {
  const pid_t child = fork();
  if (child == 0) _exit(function(0) > 0 ? 0 : 1);
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) return 0;
  return function(seconds);
}

double bf16_dot_rate(double seconds) { return if_it_runs(dot_bf16, seconds); }
double bf16_tile_rate(double seconds) { return if_it_runs(dot_tile, seconds); }

#else

double bf16_dot_rate(double seconds) { return 0 * seconds; }
double bf16_tile_rate(double seconds) { return 0 * seconds; }

#endif
