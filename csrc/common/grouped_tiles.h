// Grouped products in bfloat16 by AMX tiles. Torch-free.
//
// Included by grouped_panels.h alone, for the sets that have tiles; what it says of panels, blocks
// and sums that no cut changes holds here. A c is a chain over blocks of 32 k. What a block adds is
// the sum of two chains of fused multiply-adds, one over its even and one over its odd k, and
// denormals count as zero.
//
// A's rows become tiles of equally many rows (16 at most), each [height][32 k]; a packed panel of B
// holds two tiles of 16 columns side by side. Tiles of fewer rows take the multiplier fewer cycles,
// so one row is no special case.
#pragma once
#include "csrc/common/grouped_pairs.h"

namespace mergeme {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileWords = 16;  // in a row
// Steps of 32 k of a panel that stay in the first-level cache with the same steps of two of A's
// tiles: 16 KB each.
constexpr int64_t kTileSteps = 8;

// How far ahead of their use packed weights are asked for when a single pass reads them.
constexpr int64_t kAheadBytes = 4096;

// Instructions as asm, not as GCC's intrinsics: those do not say which memory they read.
template <int kTile>
MERGEME_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MERGEME_INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MERGEME_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSum, int kLeft, int kRight>
MERGEME_INLINE void add_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// tmm0 to 3: sums; tmm4 to 7: operands. Sums and A's tiles have `height` rows, except that in a
// `wide` product tmm5 to 7 are all B's.
class TileScope {
 public:
  TileScope(int64_t height, bool wide) {
    // Others may hold tiles on this thread: oneDNN configures once for many calls and remembers
    // that it did. They find the configuration again that they left.
    __asm__ volatile("sttilecfg (%0)" ::"r"(before_) : "memory");
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 4 * kTileWords;
      config[48 + tile] = uint8_t(tile < (wide ? 5 : 6) ? height : kTileRows);
    }
    __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
  }
  ~TileScope() {
    if (before_[0] != 0)
      __asm__ volatile("ldtilecfg (%0)" ::"r"(before_) : "memory");
    else
      __asm__ volatile("tilerelease" ::: "memory");  // else every task switch would save them
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// Lines of weights to ask for while a product runs, so many a step.
struct Ahead {
  const char* at;
  int64_t lines;
  MERGEME_INLINE void step() {
    for (int64_t i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Two (or one) of A's tiles, `a_stride` bytes apart, times the two column tiles of a panel.
template <int kRowTiles>
void multiply_square(const char* a, int64_t a_stride, int64_t a_step, const char* b, int64_t steps,
                     float* c, int64_t ldc, int64_t height, bool first, Ahead ahead) {
  constexpr int64_t kAStride = 4 * kTileWords, kBStride = 4 * kPanelColumns;
  constexpr int64_t kBStep = kTileRows * kBStride;
  float* const lower = c + height * ldc;
  if (first) {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (kRowTiles == 2) {
      zero_tile<2>();
      zero_tile<3>();
    }
  } else {
    load_tile<0>(c, 4 * ldc);
    load_tile<1>(c + kTileWords, 4 * ldc);
    if constexpr (kRowTiles == 2) {
      load_tile<2>(lower, 4 * ldc);
      load_tile<3>(lower + kTileWords, 4 * ldc);
    }
  }
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += kBStep) {
    load_tile<4>(a, kAStride);
    load_tile<6>(b, kBStride);
    add_product<0, 4, 6>();
    load_tile<7>(b + 4 * kTileWords, kBStride);
    add_product<1, 4, 7>();
    if constexpr (kRowTiles == 2) {
      load_tile<5>(a + a_stride, kAStride);
      add_product<2, 5, 6>();
      add_product<3, 5, 7>();
    }
    ahead.step();
  }
  store_tile<0>(c, 4 * ldc);
  store_tile<1>(c + kTileWords, 4 * ldc);
  if constexpr (kRowTiles == 2) {
    store_tile<2>(lower, 4 * ldc);
    store_tile<3>(lower + kTileWords, 4 * ldc);
  }
}

// One of A's tiles times the four column tiles of two panels, `b_stride` bytes apart: so A is read
// once for both, and four sums hide the multiplier's latency.
inline void multiply_wide(const char* a, int64_t a_step, const char* b, int64_t b_stride,
                          int64_t steps, float* c, int64_t ldc, bool first, Ahead ahead,
                          Ahead ahead_second) {
  constexpr int64_t kAStride = 4 * kTileWords, kBStride = 4 * kPanelColumns;
  constexpr int64_t kBStep = kTileRows * kBStride;
  if (first) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  } else {
    load_tile<0>(c, 4 * ldc);
    load_tile<1>(c + kTileWords, 4 * ldc);
    load_tile<2>(c + 2 * kTileWords, 4 * ldc);
    load_tile<3>(c + 3 * kTileWords, 4 * ldc);
  }
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += kBStep) {
    load_tile<4>(a, kAStride);
    load_tile<5>(b, kBStride);
    add_product<0, 4, 5>();
    load_tile<6>(b + 4 * kTileWords, kBStride);
    add_product<1, 4, 6>();
    ahead.step();
    load_tile<7>(b + b_stride, kBStride);
    add_product<2, 4, 7>();
    load_tile<5>(b + b_stride + 4 * kTileWords, kBStride);
    add_product<3, 4, 5>();
    ahead_second.step();
  }
  store_tile<0>(c, 4 * ldc);
  store_tile<1>(c + kTileWords, 4 * ldc);
  store_tile<2>(c + 2 * kTileWords, 4 * ldc);
  store_tile<3>(c + 3 * kTileWords, 4 * ldc);
}

// A tile of A's rows [m, m + rows) over the whole depth: out[step][height][32].
MERGEME_INLINE void pack_left_tile(const Operand& a, int64_t m, int64_t rows, int64_t height,
                                   int64_t depth, char* out, int64_t step) {
  if (!a.across) {
    for (int64_t r = 0; r < height; ++r) {
      const auto* from = r < rows ? a.template row<bfloat16_t>(m + r) : nullptr;
      char* to = out + r * 4 * kTileWords;
      for (int64_t k = 0; k < depth; k += kPackedDepth, to += step)
        _mm512_storeu_si512(to, load_halves(from ? from + k : nullptr, depth - k));
    }
    return;
  }
  __m512i words[kWordLanes];
  for (int64_t k = 0; k < depth; k += kPackedDepth, out += step) {
    pair_steps(a, m, rows, k, depth, words);
    transpose_words(words);
    for (int64_t r = 0; r < height; ++r) _mm512_storeu_si512(out + r * 4 * kTileWords, words[r]);
  }
}

// multiply_panels for bfloat16.
template <typename Epilogue>
MERGEME_INLINE void multiply_panels_by_tiles(const PanelTask& task, void* scratch,
                                             Epilogue epilogue) {
  const int64_t tiles = parts(task.rows, kTileRows);
  if (tiles == 0) return;
  const int64_t height = parts(task.rows, tiles), steps = parts(task.depth, kPackedDepth);
  const int64_t a_step = 4 * height * kTileWords, a_stride = steps * a_step;
  constexpr int64_t kStepWords = kTileRows * kPanelColumns;  // of a panel
  // One tile of rows: two panels at once.
  const int64_t at_once = tiles == 1 ? 2 : 1, ldc = at_once * kPanelColumns;
  char* left = static_cast<char*>(scratch);
  float* c = reinterpret_cast<float*>(left + tiles * a_stride);
  uint32_t* right = reinterpret_cast<uint32_t*>(c + tiles * height * ldc);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t m = i * height, rows = smaller(height, task.rows - m);
    pack_left_tile(task.a, task.first_row + m, rows, height, task.depth, left + i * a_stride,
                   a_step);
  }

  const TileScope scope(height, tiles == 1);
  const auto* packed = static_cast<const uint32_t*>(task.packed);
  const int64_t passes = parts(tiles, 2);
  // Packed weights that one pass reads need no cutting to fit a cache.
  const int64_t step = packed && passes == 1 && steps > 0 ? steps : kTileSteps;
  for (int64_t p = task.first_panel; p < task.end_panel; p += at_once) {
    const int64_t panels = smaller(at_once, task.end_panel - p);
    for (int64_t s = 0; s < steps || s == 0; s += step) {
      const int64_t some = smaller(step, steps - s), k = s * kPackedDepth;
      const uint32_t* b = right;
      int64_t b_stride = kTileSteps * kStepWords;
      if (packed) {
        b = packed + (p * steps + s) * kStepWords;
        b_stride = steps * kStepWords;
      } else {
        for (int64_t j = 0; j < panels; ++j)
          pack_right_words(task.b, p + j, task.columns, k,
                           smaller(some * kPackedDepth, task.depth - k), right + j * b_stride);
      }
      for (int64_t i = 0; i < passes; ++i) {
        const char* a = left + 2 * i * a_stride + s * a_step;
        const auto* from = reinterpret_cast<const char*>(b);
        const int64_t m = 2 * i * height;
        float* to = c + m * ldc;
        // The next steps' weights come while these are multiplied, a share of them in each pass; in
        // a single pass, those of a few steps on.
        Ahead ahead{from, 0};
        if (packed) {
          constexpr int64_t kLines = kStepWords * 4 / 64;
          ahead.lines = parts(kLines, passes);
          ahead.at +=
              passes == 1 ? kAheadBytes : (some * kStepWords * 4 + i * some * ahead.lines * 64);
        }
        if (panels == 2) {
          const Ahead second{ahead.at + 4 * b_stride, ahead.lines};
          multiply_wide(a, a_step, from, 4 * b_stride, some, to, ldc, s == 0, ahead, second);
        } else if (2 * i + 1 < tiles) {
          multiply_square<2>(a, a_stride, a_step, from, some, to, ldc, height, s == 0, ahead);
        } else {
          multiply_square<1>(a, a_stride, a_step, from, some, to, ldc, height, s == 0, ahead);
        }
        if (s + step >= steps)
          for (int64_t j = 0; j < panels; ++j)
            epilogue(m, smaller(2 * height, task.rows - m), p + j, to + j * kPanelColumns, ldc);
      }
    }
  }
}

}  // namespace
}  // namespace mergeme
