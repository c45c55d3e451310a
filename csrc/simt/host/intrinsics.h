// CUDA's built-in functions for the host shim, by their CUDA names. Test-only, torch-free.
// __activemask is left undefined on purpose: which lanes happen to run together means nothing here.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "csrc/simt/host/runtime.h"

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

namespace mergeme::simt::host {

template <typename T>
T shuffle(const char* call, unsigned mask, T value, unsigned source, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 4- and 8-byte numbers");
  struct Lane {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  memset(&mine.result, 0xFF, sizeof(T));
  warp_collective(
      call, mask, &mine,
      [](void* const* lanes) {
        for (unsigned i = 0; i < 32; ++i) {
          auto* lane = static_cast<Lane*>(lanes[i]);
          if (lane == nullptr) continue;
          if (const auto* from = static_cast<const Lane*>(lanes[lane->source]))
            lane->result = from->value;
        }
      },
      where);
  return mine.result;
}

inline unsigned lane_id() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

// The first lane of the `width` lanes that shuffle among themselves.
inline unsigned segment(int width) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
    fail("a shuffle's width must be a power of two of at most 32, got " + std::to_string(width));
  return lane_id() & ~(static_cast<unsigned>(width) - 1);
}

// Folds the values of all lanes with `F`.
template <typename T, T (*F)(T, T)>
T reduce(const char* call, unsigned mask, T value, const Where& where) {
  struct Lane {
    T value, result;
  } mine{value, value};
  warp_collective(
      call, mask, &mine,
      [](void* const* lanes) {
        T all{};
        bool first = true;
        for (unsigned i = 0; i < 32; ++i) {
          if (lanes[i] == nullptr) continue;
          const T v = static_cast<Lane*>(lanes[i])->value;
          all = first ? v : F(all, v);
          first = false;
        }
        for (unsigned i = 0; i < 32; ++i)
          if (lanes[i] != nullptr) static_cast<Lane*>(lanes[i])->result = all;
      },
      where);
  return mine.result;
}

template <typename T>
T add(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));  // wraps
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

// For each lane, the lanes whose value has the same bits.
template <typename T>
unsigned match(const char* call, unsigned mask, T value, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  struct Lane {
    T value;
    unsigned result;
  } mine{value, 0};
  warp_collective(
      call, mask, &mine,
      [](void* const* lanes) {
        for (unsigned i = 0; i < 32; ++i)
          for (unsigned j = 0; j < 32; ++j) {
            auto *a = static_cast<Lane*>(lanes[i]), *b = static_cast<Lane*>(lanes[j]);
            if (a != nullptr && b != nullptr && memcmp(&a->value, &b->value, sizeof(T)) == 0)
              a->result |= 1u << j;
          }
      },
      where);
  return mine.result;
}

inline unsigned ballot(const char* call, unsigned mask, bool predicate, const Where& where) {
  struct Lane {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  warp_collective(
      call, mask, &mine,
      [](void* const* lanes) {
        unsigned votes = 0;
        for (unsigned i = 0; i < 32; ++i)
          if (lanes[i] != nullptr && static_cast<Lane*>(lanes[i])->predicate) votes |= 1u << i;
        for (unsigned i = 0; i < 32; ++i)
          if (lanes[i] != nullptr) static_cast<Lane*>(lanes[i])->result = votes;
      },
      where);
  return mine.result;
}

}  // namespace mergeme::simt::host

// Every collective call knows where it stands in the source, for the reports.
#define MERGEME_WHERE ::mergeme::simt::host::Where where = ::mergeme::simt::host::Where::current()

inline void __syncthreads(MERGEME_WHERE) {
  mergeme::simt::host::block_barrier("__syncthreads()", false, where);
}
inline int __syncthreads_count(int predicate, MERGEME_WHERE) {
  return static_cast<int>(
      mergeme::simt::host::block_barrier("__syncthreads_count()", predicate != 0, where));
}
inline int __syncthreads_or(int predicate, MERGEME_WHERE) {
  return mergeme::simt::host::block_barrier("__syncthreads_or()", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, MERGEME_WHERE) {
  return mergeme::simt::host::block_barrier("__syncthreads_and()", predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, MERGEME_WHERE) {
  mergeme::simt::host::ballot("__syncwarp()", mask, false, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, MERGEME_WHERE) {
  const unsigned first = mergeme::simt::host::segment(width);
  const unsigned source = first + (static_cast<unsigned>(lane) & (width - 1u));
  return mergeme::simt::host::shuffle("__shfl_sync()", mask, value, source, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MERGEME_WHERE) {
  const unsigned end = mergeme::simt::host::segment(width) + width;
  const unsigned mine = mergeme::simt::host::lane_id(), other = mine ^ (lane_mask & 31u);
  return mergeme::simt::host::shuffle("__shfl_xor_sync()", mask, value, other < end ? other : mine,
                                      where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MERGEME_WHERE) {
  const unsigned end = mergeme::simt::host::segment(width) + width;
  const unsigned mine = mergeme::simt::host::lane_id(), other = mine + (delta & 31u);
  return mergeme::simt::host::shuffle("__shfl_down_sync()", mask, value, other < end ? other : mine,
                                      where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MERGEME_WHERE) {
  const unsigned first = mergeme::simt::host::segment(width);
  const unsigned mine = mergeme::simt::host::lane_id(), back = delta & 31u;
  return mergeme::simt::host::shuffle("__shfl_up_sync()", mask, value,
                                      mine >= first + back ? mine - back : mine, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MERGEME_WHERE) {
  return mergeme::simt::host::ballot("__ballot_sync()", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, MERGEME_WHERE) {
  return mergeme::simt::host::ballot("__any_sync()", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MERGEME_WHERE) {
  return mergeme::simt::host::ballot("__all_sync()", mask, predicate != 0, where) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, MERGEME_WHERE) {
  return mergeme::simt::host::match("__match_any_sync()", mask, value, where);
}
// Sums wrap. Of int or unsigned, as in CUDA.
template <typename T>
T __reduce_add_sync(unsigned mask, T value, MERGEME_WHERE) {
  using namespace mergeme::simt::host;
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return reduce<T, add<T>>("__reduce_add_sync()", mask, value, where);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, MERGEME_WHERE) {
  using namespace mergeme::simt::host;
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return reduce<T, mergeme::simt::host::max<T>>("__reduce_max_sync()", mask, value, where);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, MERGEME_WHERE) {
  using namespace mergeme::simt::host;
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return reduce<T, mergeme::simt::host::min<T>>("__reduce_min_sync()", mask, value, where);
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}

// Integers only: an atomic sum of floats depends on the order of threads. CUDA has no overload for
// unsigned long, which is what uint64_t may be.
inline int atomicAdd(int* p, int v) {
  return std::exchange(*p, static_cast<int>(static_cast<unsigned>(*p) + static_cast<unsigned>(v)));
}
inline unsigned atomicAdd(unsigned* p, unsigned v) { return std::exchange(*p, *p + v); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return std::exchange(*p, *p + v);
}

#undef MERGEME_WHERE
