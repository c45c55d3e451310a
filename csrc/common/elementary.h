// Exponentials, logarithms and roots that give the same bits on every backend: each operation is
// spelled out and rounds in its type. Torch-free.
#pragma once
#include <cstdint>
#include <limits>

#include "csrc/common/numeric.h"

namespace mergeme {

// exp(x) for x <= 0, within 2 units in the last place: 2^n * exp(r) with |r| <= log(2) / 2 and the
// polynomial of degree 6 in r of least relative error, a twentieth of a unit. NaN stays NaN. In
// float, what is below 2^-126 becomes 0.
MERGEME_HD float exp_nonpositive(float x) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -88.f ? -88.f : x;            // where n is -127
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log(2) in two parts
  float y = 0.00138145401f;
  y = y * r + 0.0083687452f;
  y = y * r + 0.0416683908f;
  y = y * r + 0.166665204f;
  y = y * r + 0.499999934f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  // The low bits of `shifted` are n's; 2^n is the number with the exponent n + 127, 0 for n = -127.
  return y * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

MERGEME_HD double exp_nonpositive(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -746.0 ? -746.0 : x;
  const double shifted = x * 1.4426950408889634074 + kMagic;
  const double n = shifted - kMagic;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double y = 1.0 / 6227020800.0;  // 1 / 13!
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const int64_t exponent = static_cast<int64_t>(bits_of(shifted) - bits_of(kMagic));
  const uint64_t half = static_cast<uint64_t>(exponent >> 1);
  const uint64_t rest = static_cast<uint64_t>(exponent) - half;
  return y * double_of((half + 1023u) << 52) * double_of((rest + 1023u) << 52);
}

template <typename A>
MERGEME_HD A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

// log(1 + t) / t for t in [0, 1], within 3 units in the last place. In float the polynomial of
// degree 9 in t - 1/2 of least relative error, a tenth of a unit. In double, with u = t / (2 + t),
// it is 2 / (2 + t) * (1 + u^2 / 3 + u^4 / 5 + ...), and u^2 <= 1/9.
MERGEME_HD float log1p_ratio(float t) {
  const float s = t - 0.5f;
  float y = -0.00324402535f;
  y = y * s + 0.005253351f;
  y = y * s - 0.00674991139f;
  y = y * s + 0.0115761503f;
  y = y * s - 0.0205702958f;
  y = y * s + 0.0366354729f;
  y = y * s - 0.0676876987f;
  y = y * s + 0.132609004f;
  y = y * s - 0.28852711f;
  return y * s + 0.81093022f;
}
MERGEME_HD double log1p_ratio(double t) {
  const double q = 1.0 / (2.0 + t), u = t * q, w = u * u;
  double y = 1.0 / 33;
  y = y * w + 1.0 / 31;
  y = y * w + 1.0 / 29;
  y = y * w + 1.0 / 27;
  y = y * w + 1.0 / 25;
  y = y * w + 1.0 / 23;
  y = y * w + 1.0 / 21;
  y = y * w + 1.0 / 19;
  y = y * w + 1.0 / 17;
  y = y * w + 1.0 / 15;
  y = y * w + 1.0 / 13;
  y = y * w + 1.0 / 11;
  y = y * w + 1.0 / 9;
  y = y * w + 1.0 / 7;
  y = y * w + 1.0 / 5;
  y = y * w + 1.0 / 3;
  y = y * w + 1.0;
  return 2.0 * q * y;
}

// log(x) for positive, normal x, within 2 units in the last place of the larger of it and 1: x is
// 2^n * m with m between the roots of 1/2 and 2, and log(m) = 2 u (1 + u^2 / 3 + u^4 / 5 + ...)
// with u = (m - 1) / (m + 1). NaN stays NaN.
MERGEME_HD float log_positive(float x) {
  const int32_t n = static_cast<int32_t>(bits_of(x) - 0x3f3504f3u) >> 23;
  const float m = float_of(bits_of(x) - (static_cast<uint32_t>(n) << 23));
  const float u = (m - 1.f) / (m + 1.f), w = u * u;
  float y = 1.f / 11;
  y = y * w + 1.f / 9;
  y = y * w + 1.f / 7;
  y = y * w + 1.f / 5;
  y = y * w + 1.f / 3;
  y = y * w + 1.f;
  const float k = static_cast<float>(n);
  return x != x ? x : k * 0.693359375f + (2.f * u * y - k * 2.12194440e-4f);
}
MERGEME_HD double log_positive(double x) {
  const int64_t n = static_cast<int64_t>(bits_of(x) - 0x3fe6a09e667f3bcdull) >> 52;
  const double m = double_of(bits_of(x) - (static_cast<uint64_t>(n) << 52));
  const double u = (m - 1.0) / (m + 1.0), w = u * u;
  double y = 1.0 / 23;
  y = y * w + 1.0 / 21;
  y = y * w + 1.0 / 19;
  y = y * w + 1.0 / 17;
  y = y * w + 1.0 / 15;
  y = y * w + 1.0 / 13;
  y = y * w + 1.0 / 11;
  y = y * w + 1.0 / 9;
  y = y * w + 1.0 / 7;
  y = y * w + 1.0 / 5;
  y = y * w + 1.0 / 3;
  y = y * w + 1.0;
  const double k = static_cast<double>(n);
  return x != x ? x : k * 6.93145751953125e-1 + (2.0 * u * y + k * 1.42860682030941723212e-6);
}

#if defined(__CUDA_ARCH__)
MERGEME_HD float square_root(float x) { return __fsqrt_rn(x); }
MERGEME_HD double square_root(double x) { return __dsqrt_rn(x); }
#else
MERGEME_HD float square_root(float x) { return __builtin_sqrtf(x); }
MERGEME_HD double square_root(double x) { return __builtin_sqrt(x); }
#endif

}  // namespace mergeme
