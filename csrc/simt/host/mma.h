// What the instructions of mma.cuh do to a warp, for the host shim. Test-only, torch-free.
#pragma once
#include <cstdint>
#include <cstring>

#include "csrc/common/numeric.h"
#include "csrc/simt/host/runtime.h"

namespace mergeme::simt::host {

// Count matrices of 8 x 8 16-bit elements; see ldmatrix_x4.
template <unsigned Count, bool Transpose>
void ldmatrix(const char* call, uint32_t (&r)[Count], const void* row,
              Where where = Where::current()) {
  struct Lane {
    const void* row;
    uint32_t* r;
  } mine{row, r};
  warp_collective(
      call, ~0u, &mine,
      [](void* const* lanes) {
        for (unsigned m = 0; m < Count; ++m) {
          uint16_t matrix[8][8];
          for (unsigned i = 0; i < 8; ++i) {
            const void* from = static_cast<const Lane*>(lanes[8 * m + i])->row;
            if (!is_shared(from, 16) || reinterpret_cast<uintptr_t>(from) % 16 != 0)
              fail("ldmatrix: expected lane " + std::to_string(8 * m + i) +
                   " to give 16 bytes in shared memory at a multiple of 16");
            memcpy(matrix[i], from, 16);
          }
          for (unsigned l = 0; l < 32; ++l) {
            const unsigned i = l / 4, j = 2 * (l % 4);
            const uint32_t low = Transpose ? matrix[j][i] : matrix[i][j];
            const uint32_t high = Transpose ? matrix[j + 1][i] : matrix[i][j + 1];
            static_cast<Lane*>(lanes[l])->r[m] = low | high << 16;
          }
        }
      },
      where);
}

// d += a b; see mma_m16n8k16.
template <typename T>
void mma(const char* call, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         Where where = Where::current()) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  warp_collective(
      call, ~0u, &mine,
      [](void* const* lanes) {
        const auto element = [](uint32_t pair, unsigned half) {
          return static_cast<double>(to_acc(T{static_cast<uint16_t>(pair >> 16 * half)}));
        };
        double A[16][16], B[16][8], D[16][8];  // double holds every product exactly
        for (unsigned l = 0; l < 32; ++l) {
          const auto* lane = static_cast<const Lane*>(lanes[l]);
          const unsigned group = l / 4, thread = l % 4;
          for (unsigned i = 0; i < 8; ++i)
            A[group + i / 2 % 2 * 8][2 * thread + i % 2 + i / 4 * 8] =
                element(lane->a[i / 2], i % 2);
          for (unsigned i = 0; i < 4; ++i) {
            B[2 * thread + i % 2 + i / 2 * 8][group] = element(lane->b[i / 2], i % 2);
            D[group + i / 2 * 8][2 * thread + i % 2] = lane->d[i];
          }
        }
        for (unsigned m = 0; m < 16; ++m)
          for (unsigned k = 0; k < 16; ++k)
            for (unsigned n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
        for (unsigned l = 0; l < 32; ++l)
          for (unsigned i = 0; i < 4; ++i)
            static_cast<Lane*>(lanes[l])->d[i] =
                static_cast<float>(D[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2]);
      },
      where);
}

// See round_pair in mma.cuh.
template <typename T>
uint32_t round_pair(float first, float second) {
  return from_acc<T>(first).bits | uint32_t{from_acc<T>(second).bits} << 16;
}

}  // namespace mergeme::simt::host
