#include "csrc/ops/gram/cpu_loops.h"

#include "csrc/common/cpu_vector.h"

namespace mergeme::gram::MERGEME_ISA {
namespace {

constexpr int kWide = mergeme::kLanes<double>;  // doubles in a vector
constexpr int kStrip = mergeme::kLanes<float>;  // lanes summed at once: two vectors of doubles
static_assert(kSumLanes % kStrip == 0 && kStep % kSumLanes == 0 && kRowBlock % kStep == 0);

// c + a * b. Of numbers that were float32 the product is exact, so fusing changes no bit.
template <typename Acc>
MERGEME_INLINE DoubleVector add_product(DoubleVector a, DoubleVector b, DoubleVector c) {
  if constexpr (sizeof(Acc) == 4) return fma(a, b, c);
  return c + a * b;
}

// kStrip elements as doubles.
struct Strip {
  DoubleVector low, high;
};

MERGEME_INLINE Strip widen(FloatVector v) {
#if defined(__AVX512F__)  // gcc 12 makes two halves and a join of __builtin_convertvector
  // The masked forms, all lanes on: gcc 12 warns about its own header in the plain ones.
  const __m512d all = _mm512_castps_pd(v);
  const __m256 low = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, all, 0));
  const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, all, 1));
  return {_mm512_maskz_cvtps_pd(0xff, low), _mm512_maskz_cvtps_pd(0xff, high)};
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  return {__builtin_convertvector(halves[0], DoubleVector),
          __builtin_convertvector(halves[1], DoubleVector)};
#endif
}

// The first n elements, n at most kStrip, of tensor - base; zeros beyond.
template <typename T, bool kBase>
MERGEME_INLINE Strip load_strip(const T* base, const T* tensor, int n) {
  const auto at = [n](const T* from, int first) {
    constexpr int kItems = mergeme::kLanes<acc_t<T>>;
    if (n >= first + kItems) return load(from + first);
    return load_some(from + first, n > first ? n - first : 0);
  };
  const auto x = [&](int first) {
    if constexpr (kBase) return at(tensor, first) - at(base, first);
    return at(tensor, first);
  };
  if constexpr (sizeof(acc_t<T>) == 4)
    return widen(x(0));
  else
    return {x(0), x(kWide)};
}

// to[e] = tensor[e] - base[e] for n elements at most kStep, and zeros up to a multiple of the
// lanes: they add nothing to any sum.
template <typename T, bool kBase>
MERGEME_INLINE void widen_step(const T* base, const T* tensor, int n, double* to) {
  for (int e = 0; e < n; e += kStrip) {
    const Strip x = load_strip<T, kBase>(kBase ? base + e : nullptr, tensor + e, n - e);
    store(to + e, x.low);
    store(to + e + kWide, x.high);
  }
  for (int e = (n + kStrip - 1) / kStrip * kStrip; e % kSumLanes != 0; e += kWide)
    store(to + e, DoubleVector{});
}
template <typename T>
MERGEME_INLINE void widen_step(const T* base, const T* tensor, int n, double* to) {
  if (base != nullptr)
    widen_step<T, true>(base, tensor, n, to);
  else
    widen_step<T, false>(base, tensor, n, to);
}

// Asks for a stretch ahead of its use: several tensors at once are too many short runs for the
// processor's own read-ahead.
template <typename T>
MERGEME_INLINE void prefetch(const T* from, int n) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int b = 0; b < n * int(sizeof(T)); b += 64) __builtin_prefetch(at + b);
}

// sums[m][l] += x_m[e] * y[e] over the elements e of lane l, in index order, for kLeft models x_m,
// kStep doubles apart; n is a multiple of the lanes.
template <typename Acc, int kLeft>
MERGEME_INLINE void add_products(const double* x, const double* y, int n, double* sums) {
  for (int strip = 0; strip < kSumLanes; strip += kStrip) {
    Strip sum[kLeft];
#pragma GCC unroll 4
    for (int m = 0; m < kLeft; ++m) {
      sum[m].low = load(sums + m * kSumLanes + strip);
      sum[m].high = load(sums + m * kSumLanes + strip + kWide);
    }
    for (int e = strip; e < n; e += kSumLanes) {
      const DoubleVector low = load(y + e), high = load(y + e + kWide);
#pragma GCC unroll 4
      for (int m = 0; m < kLeft; ++m) {
        sum[m].low = add_product<Acc>(load(x + m * kStep + e), low, sum[m].low);
        sum[m].high = add_product<Acc>(load(x + m * kStep + e + kWide), high, sum[m].high);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kLeft; ++m) {
      store(sums + m * kSumLanes + strip, sum[m].low);
      store(sums + m * kSumLanes + strip + kWide, sum[m].high);
    }
  }
}

// A block of one vector: elements [first, first + count).
struct RowBlock {
  int64_t first;
  int count;
  int64_t ahead;  // how far on to read ahead
};

// sums[pair, lane] over the block for kModels models, kept in registers: one sweep over the block
// for each strip of lanes.
template <typename T, int kModels, bool kBase>
void sum_fused(const Params& p, const RowBlock& block, double* sums) {
  constexpr int kPairs = kModels * (kModels + 1) / 2;
  constexpr int kSweeps = kSumLanes / kStrip;
  // In one sweep each row's share of the lines that the next block needs.
  constexpr int kLines =
      kSumLanes * int(sizeof(T)) >= 64 * kSweeps ? kSumLanes * int(sizeof(T)) / (64 * kSweeps) : 1;
  const T* base = kBase ? static_cast<const T*>(p.base) + block.first : nullptr;
  const T* tensors[kModels];
  for (int m = 0; m < kModels; ++m) tensors[m] = static_cast<const T*>(p.tensors[m]) + block.first;
  const auto read_ahead = [&](const T* from, int row, int sweep) {
    const char* at = reinterpret_cast<const char*>(from + block.ahead + row);
    if constexpr (kSumLanes * int(sizeof(T)) >= 64 * kSweeps) {
      for (int l = 0; l < kLines; ++l)
        __builtin_prefetch(at + (sweep * kLines + l) * 64, 0, 2);  // into the second cache
    } else if (row / kSumLanes % kSweeps == sweep) {
      for (int b = 0; b < kSumLanes * int(sizeof(T)); b += 64) __builtin_prefetch(at + b, 0, 2);
    }
  };
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    Strip sum[kPairs] = {};
    const auto add_row = [&](int e, int n) __attribute__((always_inline)) {
      Strip x[kModels];
#pragma GCC unroll 4
      for (int m = 0; m < kModels; ++m)
        x[m] = load_strip<T, kBase>(kBase ? base + e : nullptr, tensors[m] + e, n);
#pragma GCC unroll 4
      for (int j = 0; j < kModels; ++j)
#pragma GCC unroll 4
        for (int i = 0; i <= j; ++i) {
          Strip& to = sum[j * (j + 1) / 2 + i];
          to.low = add_product<acc_t<T>>(x[i].low, x[j].low, to.low);
          to.high = add_product<acc_t<T>>(x[i].high, x[j].high, to.high);
        }
    };
    const int lane = sweep * kStrip;
    int row = 0;
    for (; row + kSumLanes <= block.count; row += kSumLanes) {
      if (kBase) read_ahead(base, row, sweep);
#pragma GCC unroll 4
      for (int m = 0; m < kModels; ++m) read_ahead(tensors[m], row, sweep);
      add_row(row + lane, kStrip);
    }
    if (row + lane < block.count) add_row(row + lane, block.count - row - lane);
    for (int pair = 0; pair < kPairs; ++pair) {
      store(sums + pair * kSumLanes + lane, sum[pair].low);
      store(sums + pair * kSumLanes + lane + kWide, sum[pair].high);
    }
  }
}

// The same for any number of models: widened into `scratch` step by step.
template <typename T>
void sum_steps(const Params& p, const RowBlock& block, double* scratch, double* sums) {
  using Acc = acc_t<T>;
  memset(sums, 0, size_t(num_pairs(p.num_models)) * kSumLanes * sizeof(double));
  for (int at = 0; at < block.count; at += kStep) {
    const int n = block.count - at < kStep ? block.count - at : kStep;
    const int padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;
    const int64_t i = block.first + at;
    const int64_t next = block.ahead == 0 && at + 2 * kStep > block.count ? 0 : kStep;
    const T* base = p.base ? static_cast<const T*>(p.base) + i : nullptr;
    if (base) prefetch(base + next, n);
    for (int64_t m = 0; m < p.num_models; ++m) {
      const T* tensor = static_cast<const T*>(p.tensors[m]) + i;
      prefetch(tensor + next, n);
      const double* y = scratch + m * kStep;
      widen_step(base, tensor, n, scratch + m * kStep);
      int64_t l = 0;
      for (; l + 4 <= m + 1; l += 4)
        add_products<Acc, 4>(scratch + l * kStep, y, padded, sums + pair_of(l, m) * kSumLanes);
      for (; l <= m; ++l)
        add_products<Acc, 1>(scratch + l * kStep, y, padded, sums + pair_of(l, m) * kSumLanes);
    }
  }
}

template <typename T, bool kBase>
void sum_lanes_of(const Params& p, const RowBlock& block, double* scratch, double* sums) {
  switch (p.num_models) {
    case 2:
      return sum_fused<T, 2, kBase>(p, block, sums);
    case 3:
      return sum_fused<T, 3, kBase>(p, block, sums);
    case 4:
      return sum_fused<T, 4, kBase>(p, block, sums);
    default:
      return sum_steps<T>(p, block, scratch, sums);
  }
}

template <typename T>
void sum_row_block(const Params& p, int64_t unit, double* scratch) {
  const int64_t group = unit / p.blocks, number = unit % p.blocks;
  const int64_t rest = p.length - number * kRowBlock, pairs = num_pairs(p.num_models);
  RowBlock block{.first = group * p.length + number * kRowBlock,
                 .count = rest < kRowBlock ? int(rest) : kRowBlock,
                 .ahead = 0};
  if (block.first + kRowBlock + block.count <= p.groups * p.length) block.ahead = kRowBlock;
  double* sums = scratch + p.num_models * kStep;  // [pairs, kSumLanes]
  if (p.base != nullptr)
    sum_lanes_of<T, true>(p, block, scratch, sums);
  else
    sum_lanes_of<T, false>(p, block, scratch, sums);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double* lanes = sums + pair * kSumLanes;
    for (int half = kSumLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    p.partials[unit * pairs + pair] = lanes[0];
  }
}

// sums[e] += x[e] * y[e]; n is a multiple of kSumLanes.
template <typename Acc>
MERGEME_INLINE void add_each_product(const double* x, const double* y, int n, double* sums) {
  for (int e = 0; e < n; e += kWide)
    store(sums + e, add_product<Acc>(load(x + e), load(y + e), load(sums + e)));
}

template <typename T>
void sum_column_block(const Params& p, int64_t unit, double* scratch) {
  const int64_t tiles = ceil_div(p.groups, kTile);
  const int64_t block = unit / tiles, column = unit % tiles * kTile;
  const int n = p.groups - column < kTile ? int(p.groups - column) : int(kTile);
  const int padded = (n + kSumLanes - 1) / kSumLanes * kSumLanes;
  const int64_t begin = block * kColumnBlock;
  const int64_t end = p.length - begin < kColumnBlock ? p.length : begin + kColumnBlock;
  const int64_t pairs = num_pairs(p.num_models);
  double* sums = scratch + p.num_models * kStep;  // [pairs, kTile]
  memset(sums, 0, size_t(pairs) * kTile * sizeof(double));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row * p.groups + column;
    const int64_t ahead = row + 1 < end ? p.groups : 0;  // to the next row, of which n are ours
    const T* base = p.base ? static_cast<const T*>(p.base) + i : nullptr;
    if (base) prefetch(base + ahead, n);
    for (int64_t m = 0; m < p.num_models; ++m) {
      const T* tensor = static_cast<const T*>(p.tensors[m]) + i;
      prefetch(tensor + ahead, n);
      double* x = scratch + m * kStep;
      widen_step(base, tensor, n, x);
      for (int64_t l = 0; l <= m; ++l)
        add_each_product<acc_t<T>>(scratch + l * kStep, x, padded, sums + pair_of(l, m) * kTile);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair)
    memcpy(p.partials + (block * pairs + pair) * p.groups + column, sums + pair * kTile,
           size_t(n) * sizeof(double));
}

}  // namespace

void sum_units(const Params& p, int64_t begin, int64_t end, double* scratch) {
  dispatch_floating(p.dtype, [&]<typename T>() {
    for (int64_t unit = begin; unit < end; ++unit)
      if (p.axis == Axis::kRow)
        sum_row_block<T>(p, unit, scratch);
      else
        sum_column_block<T>(p, unit, scratch);
  });
}

}  // namespace mergeme::gram::MERGEME_ISA
