// Grouped products of e4m3 operands with scales, on one CPU thread, by panels. Torch-free.
//
// Included only by files that are compiled once per instruction set: all of it is internal. The
// engine is grouped_panels.h's. e4m3 numbers are exact in bfloat16, so a panel of weights is taken
// apart, 128 steps of the depth at a time, into words of two bfloat16, which the micro-kernels of
// every instruction set multiply as they do packed weights. The sums of these 128 steps then go
// into the result times both scales, in one fused multiply-add (where the set has it):
//
//   c = fma(a_scale * b_scale, partial, c)
//
// over ascending blocks. Nothing is rounded before it is multiplied, and again no cut into blocks,
// panels, tasks or threads changes a bit.
#pragma once
#include "csrc/common/float8_blocks.h"
#include "csrc/common/grouped_panels.h"

namespace mergeme {
namespace {

// ---- weights ---------------------------------------------------------------------------------

// Two words of bfloat16, for steps k, k + 1 and k + 2, k + 3, from four bytes of e4m3 in each lane.
#if defined(__AVX512F__)
// 32 e4m3 numbers, each in the upper byte of its lane.
MERGEME_INLINE __m512i bfloat16_of(__m512i bytes) {
  // Of the subnormals 0 to 7 times 2^-9.
  const __m512i table = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __m512i rest = _mm512_maskz_srli_epi16(~__mmask32{0}, bytes & _mm512_set1_epi16(0x7f00), 4);
  const __m512i normal = _mm512_maskz_add_epi16(~__mmask32{0}, rest, _mm512_set1_epi16(0x3c00));
  const __mmask32 subnormal = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(0x80));
  const __mmask32 unknown = _mm512_cmpeq_epi16_mask(rest, _mm512_set1_epi16(0x7f0));
  __m512i out = _mm512_mask_permutexvar_epi16(
      normal, subnormal, _mm512_maskz_srli_epi16(~__mmask32{0}, rest, 4), table);
  out = _mm512_mask_mov_epi16(out, unknown, _mm512_set1_epi16(0x7fc0));
  return out | (bytes & _mm512_set1_epi16(int16_t(0x8000)));
}
MERGEME_INLINE void words_of(BitsVector bytes, BitsVector& first, BitsVector& second) {
  const __m512i from = reinterpret_cast<__m512i>(bytes);
  const __m512i low = _mm512_maskz_broadcast_i32x4(
      0xffff, _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
  const __m512i high = _mm512_maskz_broadcast_i32x4(
      0xffff, _mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
  first = reinterpret_cast<BitsVector>(bfloat16_of(_mm512_shuffle_epi8(from, low)));
  second = reinterpret_cast<BitsVector>(bfloat16_of(_mm512_shuffle_epi8(from, high)));
}
#else
MERGEME_INLINE void words_of(BitsVector bytes, BitsVector& first, BitsVector& second) {
  const auto number = [&](int byte) __attribute__((always_inline)) {
    return reinterpret_cast<BitsVector>(decode_e4m3((bytes << (24 - 8 * byte)) & 0xff000000u));
  };
  first = number(0) >> 16 | number(1);
  second = number(2) >> 16 | number(3);
}
#endif

// Steps [k, k + depth) of a panel of e4m3 weights as words [depth / 2][32 columns], with zeros up
// to a multiple of kPackedDepth.
MERGEME_INLINE void pack_float8_words(const Operand& b, int64_t panel, int64_t columns, int64_t k,
                                      int64_t depth, uint32_t* out) {
  constexpr int64_t kWidth = kLanes<float>, kBytes = 4 * kWidth;
  constexpr int64_t kAhead = 4 * kScaleBlock;  // bytes of a row that are asked for before their use
  const int64_t filled_up = round_up(depth, kPackedDepth);
  for (int64_t j = 0; j < kPanelColumns; j += kWidth) {
    const char* from[kWidth];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = b.columns.row_of(panel, j + i, columns);
      from[i] =
          row < 0 ? nullptr : reinterpret_cast<const char*>(b.template row<float8_e4m3_t>(row) + k);
    }
    for (int64_t at = 0; at < filled_up; at += kBytes) {
      const int64_t some = smaller(kBytes, depth - at);
      vector_t<float> square[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        square[i] = vector_t<float>{};
        if (from[i] == nullptr || some <= 0) continue;
        if (kWidth == 16 || at % 64 == 0) __builtin_prefetch(from[i] + at + kAhead);
        memcpy(&square[i], from[i] + at, size_t(some == kBytes ? kBytes : some));
      }
      transpose<float>(square);
      const int64_t lines = smaller(kWidth, (filled_up - at) / 4);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        if (i >= lines) break;
        BitsVector first, second;
        words_of(reinterpret_cast<BitsVector>(square[i]), first, second);
        uint32_t* to = out + (at + 4 * i) / 2 * kPanelColumns + j;
        memcpy(to, &first, sizeof first);
        memcpy(to + kPanelColumns, &second, sizeof second);
      }
    }
  }
}

// ---- rows ------------------------------------------------------------------------------------

// A task's rows, repacked for the micro-kernels of one instruction set and cut into blocks.
#if defined(__AMX_BF16__)
class ScaledRows {
 public:
  ScaledRows(const PanelTask& task, void* scratch)
      : rows_(task.rows),
        tiles_(parts(task.rows, kTileRows)),
        height_(parts(task.rows, tiles_)),
        steps_(parts(task.depth, kPackedDepth)),
        left_(static_cast<char*>(scratch)),
        scope_(height_, false) {
    for (int64_t i = 0; i < tiles_; ++i) {
      const int64_t m = i * height_;
      pack_left_tile(task.a, task.first_row + m, smaller(height_, rows_ - m), height_, task.depth,
                     left_ + i * tile_bytes(), step_bytes());
    }
  }
  void* end() const { return left_ + tiles_ * tile_bytes(); }
  int64_t blocks() const { return parts(tiles_, 2); }
  int64_t first(int64_t block) const { return smaller(2 * block * height_, rows_); }
  void widen(const uint32_t*, int64_t, float*) const {}
  // partial [rows of the block, 32] = rows times steps [k, k + depth) of a panel.
  void multiply(int64_t block, int64_t k, const uint32_t* words, const float*, int64_t depth,
                float* partial) const {
    const char* a = left_ + 2 * block * tile_bytes() + k / kPackedDepth * step_bytes();
    const auto* b = reinterpret_cast<const char*>(words);
    const int64_t steps = parts(depth, kPackedDepth);
    if (2 * block + 1 < tiles_)
      multiply_square<2>(a, tile_bytes(), step_bytes(), b, steps, partial, kPanelColumns, height_,
                         true, {b, 0});
    else
      multiply_square<1>(a, tile_bytes(), step_bytes(), b, steps, partial, kPanelColumns, height_,
                         true, {b, 0});
  }

 private:
  int64_t step_bytes() const { return 4 * height_ * kTileWords; }
  int64_t tile_bytes() const { return steps_ * step_bytes(); }
  int64_t rows_, tiles_, height_, steps_;
  char* left_;
  TileScope scope_;
};
#elif defined(__AVX512BF16__)
class ScaledRows {
 public:
  ScaledRows(const PanelTask& task, void* scratch)
      : rows_(task.rows),
        words_(parts(task.depth, kPackedDepth) * kPackedDepth / 2),
        left_(static_cast<uint32_t*>(scratch)) {
    for (int64_t i = 0; i < blocks(); ++i) {
      const int64_t m = task.first_row + first(i), count = first(i + 1) - first(i);
      const auto row = [&](int64_t j) __attribute__((always_inline)) {
        return j < count ? task.a.template row<bfloat16_t>(m + j) : nullptr;
      };
      pack_words(task.a, m, count, row, 0, task.depth, left_ + i * words_ * kDotStride, kDotStride);
    }
  }
  void* end() const { return left_ + blocks() * words_ * kDotStride; }
  int64_t blocks() const { return parts(rows_, kDotRows); }
  int64_t first(int64_t block) const { return rows_ * block / blocks(); }
  void widen(const uint32_t*, int64_t, float*) const {}
  void multiply(int64_t block, int64_t k, const uint32_t* words, const float*, int64_t depth,
                float* partial) const {
    multiply_dot_block(first(block + 1) - first(block),
                       left_ + (block * words_ + k / 2) * kDotStride, words, 0,
                       round_up(depth, kPackedDepth) / 2, 1, partial, kPanelColumns, true);
  }

 private:
  int64_t rows_, words_;
  uint32_t* left_;
};
#else
class ScaledRows {
 public:
  ScaledRows(const PanelTask& task, void* scratch)
      : rows_(task.rows),
        size_(round_up(task.depth, kPackedDepth) * kRowStride),
        left_(static_cast<float*>(scratch)) {
    for (int64_t i = 0; i < blocks(); ++i) {
      float* to = left_ + i * size_;
      pack_left<bfloat16_t>(task.a, task.first_row + first(i), first(i + 1) - first(i), task.depth,
                            to);
      for (int64_t at = task.depth * kRowStride; at < size_; ++at) to[at] = 0;
    }
  }
  void* end() const { return left_ + blocks() * size_; }
  int64_t blocks() const { return parts(rows_, kMaxRows); }
  int64_t first(int64_t block) const { return rows_ * block / blocks(); }
  // Words are taken apart for each block of rows, or once for many.
  bool widens() const { return blocks() > kDirectBlocks; }
  void widen(const uint32_t* words, int64_t depth, float* out) const {
    if (widens()) widen_panel(reinterpret_cast<const bfloat16_t*>(words), 0, depth, out);
  }
  void multiply(int64_t block, int64_t k, const uint32_t* words, const float* widened,
                int64_t depth, float* partial) const {
    const float* a = left_ + block * size_ + k * kRowStride;
    const int64_t rows = first(block + 1) - first(block);
    if (widens())
      multiply_panel(rows, a, widened, depth, partial, kPanelColumns, true,
                     reinterpret_cast<const char*>(widened), 0);
    else
      multiply_packed<bfloat16_t>(rows, a, words, 0, round_up(depth, 2), 1, partial, kPanelColumns);
  }

 private:
  int64_t rows_, size_;
  float* left_;
};
#endif

// ---- one group's share -----------------------------------------------------------------------

// multiply_panels for a ScaledTask.
template <typename Epilogue>
MERGEME_INLINE void multiply_scaled_panels(const ScaledTask& task, void* scratch,
                                           Epilogue epilogue) {
  constexpr int64_t kWidth = kLanes<float>, kHalf = kPanelColumns / 2;
  constexpr int64_t ldc = kPanelGroup * kPanelColumns;
  const PanelTask& product = task.product;
  const int64_t depth = product.depth, depth_blocks = scale_blocks(depth);
  const ScaledRows rows(product, scratch);
  const int64_t blocks = rows.blocks();
  float* c = static_cast<float*>(rows.end());
  float* partial = c + product.rows * ldc;
  const float** row_scales = reinterpret_cast<const float**>(partial + 32 * kPanelColumns);
  float* widened = reinterpret_cast<float*>(row_scales + product.rows);
  uint32_t* words = reinterpret_cast<uint32_t*>(widened + kScaleBlock * kPanelColumns);
  for (int64_t r = 0; r < product.rows; ++r)
    row_scales[r] = task.a_scale.row<float>(product.first_row + r);
  // The block of weight rows that half a panel's columns are in.
  const auto scale_row = [&](int64_t panel, int64_t half) {
    if (product.b.columns.gated_up == 0) return panel * kPanelColumns / kScaleBlock;
    return panel * kHalf / kScaleBlock + half * task.up_scale;
  };
  // Few rows: the weights stream by, one panel after the other. Many: they are what is read again
  // and again, and a block's depth of them stays in the caches for several panels.
  const int64_t group = blocks <= kDirectBlocks ? 1 : kPanelGroup;
  for (int64_t p = product.first_panel; p < product.end_panel; p += group) {
    const int64_t count = smaller(group, product.end_panel - p);
    if (depth == 0)
      for (int64_t i = 0; i < product.rows * ldc; ++i) c[i] = 0;
    for (int64_t b = 0; b < depth_blocks; ++b) {
      const int64_t k = b * kScaleBlock, some = smaller(kScaleBlock, depth - k);
      for (int64_t j = 0; j < count; ++j) {
        pack_float8_words(product.b, p + j, product.columns, k, some, words);
        rows.widen(words, some, widened);
        const float scale[2] = {task.b_scale[scale_row(p + j, 0) * depth_blocks + b],
                                task.b_scale[scale_row(p + j, 1) * depth_blocks + b]};
        for (int64_t i = 0; i < blocks; ++i) {
          rows.multiply(i, k, words, widened, some, partial);
          const int64_t end = rows.first(i + 1);
          const float* from = partial;
          for (int64_t r = rows.first(i); r < end; ++r, from += kPanelColumns) {
            const float row_scale = row_scales[r][b];
            float* to = c + r * ldc + j * kPanelColumns;
#pragma GCC unroll 8
            for (int64_t v = 0; v < kPanelColumns; v += kWidth) {
              const auto both = broadcast(row_scale * scale[v >= kHalf]);
              store(to + v, fma(both, load(from + v), b == 0 ? vector_t<float>{} : load(to + v)));
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t j = 0; j < count; ++j) {
        const int64_t m = rows.first(i);
        epilogue(m, rows.first(i + 1) - m, p + j, c + m * ldc + j * kPanelColumns, ldc);
      }
  }
}

}  // namespace
}  // namespace mergeme
