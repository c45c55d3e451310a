// alu.cpp - arithmetic, logic, compare, convert and move instructions.
#include <immintrin.h>
#include <cfenv>
#include "csrc/ptx/instructions/instructions.h"

namespace mergeme::ptx {

// ---------------------------------------------------------------- number formats
struct Fmt {
  int eb, mb;
  bool inf;
};
static Fmt fmtOf(Type t) {
  switch (t) {
    case Type::kF16:
    case Type::kF16x2:
      return {5, 10, true};
    case Type::kBF16:
    case Type::kBF16x2:
      return {8, 7, true};
    case Type::kTF32:
      return {8, 10, true};
    case Type::kF32:
      return {8, 23, true};
    case Type::kE4M3:
    case Type::kE4M3x2:
      return {4, 3, false};
    case Type::kE5M2:
    case Type::kE5M2x2:
      return {5, 2, true};
    default:
      return {11, 52, true};
  }
}
uint64_t encode_float(double x, Type t, Rounding rnd, bool satf) {
  if (t == Type::kF64) return std::bit_cast<uint64_t>(x);
  Fmt f = fmtOf(t);
  int bias = (1 << (f.eb - 1)) - 1;
  uint64_t sign = std::signbit(x) ? 1 : 0;
  uint64_t sbit = sign << (f.eb + f.mb);
  int shift = t == Type::kTF32 ? 13 : 0;
  uint64_t r;
  uint64_t infp = f.inf ? (((1ull << f.eb) - 1) << f.mb) : 0x7f, maxp = infp - 1;
  if (x != x)
    r = f.inf ? ((1ull << (f.eb + f.mb)) - 1) : 0x7f;  // canonical NaN
  else {
    double a = std::fabs(x);
    if (a == 0)
      r = sbit;
    else if (std::isinf(a))
      r = sbit | ((satf || !f.inf) ? maxp : infp);
    else {
      int e;
      std::frexp(a, &e);
      int E = std::max(e - 1, 1 - bias);
      double q = std::ldexp(a, f.mb - E), fl = std::floor(q), rem = q - fl;
      bool up;
      switch (rnd) {
        case Rounding::kRz:
        case Rounding::kRzi:
          up = false;
          break;
        case Rounding::kRm:
          up = sign && rem > 0;
          break;
        case Rounding::kRp:
          up = !sign && rem > 0;
          break;
        case Rounding::kRna:
          up = rem >= 0.5;
          break;
        default:
          up = rem > 0.5 || (rem == 0.5 && std::fmod(fl, 2.0) == 1.0);
      }
      uint64_t m = (uint64_t)fl + (up ? 1 : 0);
      uint64_t b = ((uint64_t)(E - (1 - bias)) << f.mb) + m;
      if (b >= infp)
        b = (satf || !f.inf || rnd == Rounding::kRz || (rnd == Rounding::kRm && !sign) ||
             (rnd == Rounding::kRp && sign))
                ? maxp
                : infp;
      r = sbit | b;
    }
  }
  if (x != x && t == Type::kTF32) return 0x7fffffff;
  return r << shift;
}
double decode_float(uint64_t b, Type t) {
  switch (t) {
    case Type::kF16:
      return half_to_float((uint16_t)b);
    case Type::kBF16:
      return bfloat16_to_float((uint16_t)b);
    case Type::kF32:
    case Type::kTF32:
      return std::bit_cast<float>((uint32_t)b);
    case Type::kF64:
      return std::bit_cast<double>(b);
    case Type::kE4M3: {
      uint32_t v = b & 0xff;
      double s = v & 0x80 ? -1 : 1;
      int e = (v >> 3) & 15, m = v & 7;
      if (e == 15 && m == 7) return NAN;
      return s * (e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9));
    }
    case Type::kE5M2: {
      uint32_t v = b & 0xff;
      double s = v & 0x80 ? -1 : 1;
      int e = (v >> 2) & 31, m = v & 3;
      if (e == 31) return m ? NAN : s * INFINITY;
      return s * (e ? std::ldexp(4 + m, e - 17) : std::ldexp(m, -16));
    }
    default:
      return 0;
  }
}
static inline uint16_t f2bf(float f) {
  uint32_t b = std::bit_cast<uint32_t>(f);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline uint16_t f2h(float f) {
  if (f != f) return 0x7fff;
  return std::bit_cast<uint16_t>((_Float16)f);
}
static inline float ftzf(float x) {
  uint32_t b = std::bit_cast<uint32_t>(x);
  return (b & 0x7f800000) ? x : std::bit_cast<float>(b & 0x80000000u);
}
static inline uint64_t canon(float r) { return r != r ? 0x7fffffffu : std::bit_cast<uint32_t>(r); }
static inline uint64_t canond(double r) {
  return r != r ? 0x7ff8000000000000ull : std::bit_cast<uint64_t>(r);
}
static inline float satf(float r) { return !(r > 0) ? 0.f : r > 1 ? 1.f : r; }
static double sumOdd(
    double p, double c) {  // p + c rounded to odd, so a later rounding to fewer bits is exact
  double s = p + c;
  if (!std::isfinite(s)) return s;
  double bb = s - p, e = (p - (s - bb)) + (c - bb);
  if (e != 0 && !(std::bit_cast<uint64_t>(s) & 1))
    s = std::bit_cast<double>(std::bit_cast<uint64_t>(s) + (((e > 0) == (s > 0)) ? 1 : -1));
  return s;
}
struct Mx {
  unsigned old;
  Mx(Rounding rnd) {
    old = _mm_getcsr();
    unsigned m = rnd == Rounding::kRz ? 3 : rnd == Rounding::kRm ? 1 : rnd == Rounding::kRp ? 2 : 0;
    _mm_setcsr((old & ~0x6000u) | (m << 13));
  }
  ~Mx() { _mm_setcsr(old); }
};

// ---------------------------------------------------------------- integer handlers
#define FN(NAME, EXPR)                   \
  struct NAME {                          \
    template <class T>                   \
    static inline T f(T a, T b) {        \
      (void)b;                           \
      typedef std::make_unsigned_t<T> U; \
      (void)sizeof(U);                   \
      return (T)(EXPR);                  \
    }                                    \
  };
FN(IAdd, (U)a + (U)b)
FN(ISub, (U)a - (U)b)
FN(IAnd, a& b)
FN(IOr, a | b)
FN(IXor, a ^ b)
FN(IMin, a < b ? a : b) FN(IMax, a > b ? a : b) FN(IMulLo, (uint64_t)a*(uint64_t)b) FN(INot, ~a)
    FN(INeg, (U)0 - (U)a) FN(IAbs, a < 0 ? (U)0 - (U)a : (U)a) FN(ICnot, a == 0) struct IMulHi {
  template <class T>
  static inline T f(T a, T b) {
    if constexpr (sizeof(T) == 8) {
      if constexpr (std::is_signed_v<T>)
        return (T)(((__int128)a * b) >> 64);
      else
        return (T)(((unsigned __int128)a * b) >> 64);
    } else if constexpr (std::is_signed_v<T>)
      return (T)(((int64_t)a * b) >> (8 * sizeof(T)));
    else
      return (T)(((uint64_t)a * b) >> (8 * sizeof(T)));
  }
};
struct IDiv {
  template <class T>
  static inline T f(T a, T b) {
    if (b == 0) return (T) ~(T)0;
    if constexpr (std::is_signed_v<T>)
      if (b == (T)-1) return (T)(0 - (std::make_unsigned_t<T>)a);
    return a / b;
  }
};
struct IRem {
  template <class T>
  static inline T f(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
      if (b == (T)-1) return 0;
    return a % b;
  }
};
struct IAddSat {
  template <class T>
  static inline T f(T a, T b) {
    int64_t r = (int64_t)a + (int64_t)b;
    return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : (T)r;
  }
};
struct ISubSat {
  template <class T>
  static inline T f(T a, T b) {
    int64_t r = (int64_t)a - (int64_t)b;
    return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : (T)r;
  }
};
struct IMaxRelu {
  template <class T>
  static inline T f(T a, T b) {
    T r = a > b ? a : b;
    return r < 0 ? 0 : r;
  }
};
struct IMinRelu {
  template <class T>
  static inline T f(T a, T b) {
    T r = a < b ? a : b;
    return r < 0 ? 0 : r;
  }
};
struct IShl {
  template <class T>
  static inline T f(T a, uint32_t b) {
    return b >= 8 * sizeof(T) ? 0 : (T)((std::make_unsigned_t<T>)a << b);
  }
};
struct IShr {
  template <class T>
  static inline T f(T a, uint32_t b) {
    if (b >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? (T)-1 : 0;
    return (T)(a >> b);
  }
};
template <class T, class F>
static void hBin(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  for_each_lane(mask, [&](int l) { d[l] = to_register<T>(F::template f<T>((T)a[l], (T)b[l])); });
}
template <class T, class F>
static void hUn(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  for_each_lane(mask, [&](int l) { d[l] = to_register<T>(F::template f<T>((T)a[l], (T)0)); });
}
template <class T, class F>
static void hTri(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  for_each_lane(mask, [&](int l) {
    d[l] = to_register<T>(F::template f<T>(F::template f<T>((T)a[l], (T)b[l]), (T)c[l]));
  });
}
template <class T, class F>
static void hShift(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  for_each_lane(mask,
                [&](int l) { d[l] = to_register<T>(F::template f<T>((T)a[l], (uint32_t)b[l])); });
}
template <class T, class F>
static void hMad(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  for_each_lane(mask, [&](int l) {
    d[l] = to_register<T>((T)((std::make_unsigned_t<T>)F::template f<T>((T)a[l], (T)b[l]) +
                              (std::make_unsigned_t<T>)c[l]));
  });
}
template <class T>
static void hMadHiSat(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  for_each_lane(mask, [&](int l) {
    d[l] = to_register<int32_t>(
        IAddSat::f<int32_t>(IMulHi::f<int32_t>((int32_t)a[l], (int32_t)b[l]), (int32_t)c[l]));
  });
}
template <class T, class W, bool MAD>
static void hWide(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]),
                 *c = MAD ? row(w, i.operands[3]) : a;
  for_each_lane(mask, [&](int l) {
    W r = (W)((uint64_t)(int64_t)(W)(T)a[l] * (uint64_t)(int64_t)(W)(T)b[l]);
    if (MAD) r = (W)((uint64_t)r + (uint64_t)(W)c[l]);
    d[l] = to_register<W>(r);
  });
}
template <bool S, bool HI, bool MAD>
static void h24(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]),
                 *c = MAD ? row(w, i.operands[3]) : a;
  for_each_lane(mask, [&](int l) {
    int64_t x;
    int64_t y;
    if (S) {
      x = (int32_t)((uint32_t)a[l] << 8) >> 8;
      y = (int32_t)((uint32_t)b[l] << 8) >> 8;
    } else {
      x = a[l] & 0xffffff;
      y = b[l] & 0xffffff;
    }
    uint64_t r = (uint64_t)(x * y);
    uint32_t v = HI ? (uint32_t)(r >> 16) : (uint32_t)r;
    if (MAD) v += (uint32_t)c[l];
    d[l] = v;
  });
}
#define PICK(T4, H, ...)                 \
  [&]() -> Handler {                     \
    switch (T4) {                        \
      case Type::kU8:                    \
      case Type::kB8:                    \
        return H<uint8_t, __VA_ARGS__>;  \
      case Type::kS8:                    \
        return H<int8_t, __VA_ARGS__>;   \
      case Type::kU16:                   \
      case Type::kB16:                   \
        return H<uint16_t, __VA_ARGS__>; \
      case Type::kS16:                   \
        return H<int16_t, __VA_ARGS__>;  \
      case Type::kU32:                   \
      case Type::kB32:                   \
        return H<uint32_t, __VA_ARGS__>; \
      case Type::kS32:                   \
        return H<int32_t, __VA_ARGS__>;  \
      case Type::kU64:                   \
      case Type::kB64:                   \
        return H<uint64_t, __VA_ARGS__>; \
      case Type::kS64:                   \
        return H<int64_t, __VA_ARGS__>;  \
      default:                           \
        return nullptr;                  \
    }                                    \
  }()
template <class U, int OP>
static void hCarry(Warp& w, const Instruction& i,
                   uint32_t mask) {  // OP 0 add, 1 sub, 2 mad.lo, 3 mad.hi
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]),
                 *c = OP >= 2 ? row(w, i.operands[3]) : a;
  uint32_t cc = w.carry;
  for_each_lane(mask, [&](int l) {
    typedef unsigned __int128 X;
    U x = (U)a[l], y = (U)b[l];
    uint32_t cin = i.carry_in ? (cc >> l) & 1 : 0;
    X r;
    bool cout;
    if (OP >= 2) {
      X p;
      if (i.second_flag)
        p = sizeof(U) == 8 ? (X)((__int128)(int64_t)x * (int64_t)y)
                           : (X)((int64_t)(int32_t)x * (int64_t)(int32_t)y);
      else
        p = (X)x * y;
      U q = OP == 2 ? (U)p : (U)(p >> (8 * sizeof(U)));
      x = q;
      y = (U)c[l];
    }
    if (OP == 1) {
      r = (X)x - (X)y - cin;
      cout = (X)x < (X)y + cin;
    } else {
      r = (X)x + (X)y + cin;
      cout = (r >> (8 * sizeof(U))) & 1;
    }
    d[l] = (U)r;
    if (i.carry_out) cc = (cc & ~(1u << l)) | ((uint32_t)cout << l);
  });
  w.carry = cc;
}
// ---------------------------------------------------------------- float handlers
enum FOp {
  FADD,
  FSUB,
  FMUL,
  FFMA,
  FDIV,
  FMIN,
  FMAX,
  FNEG,
  FABS,
  FRCP,
  FSQRT,
  FRSQ,
  FEX2,
  FLG2,
  FSIN,
  FCOS,
  FTANH,
  FCPYS
};
template <class T>
static inline T fmin_(T x, T y, const Instruction& i) {
  if (i.xorsign || i.abs) {
    T s = std::signbit(x) != std::signbit(y) ? (T)-1 : (T)1;
    x = std::fabs(x);
    y = std::fabs(y);
    T r = x != x ? (i.nan ? x : y) : y != y ? (i.nan ? y : x) : std::min(x, y);
    return i.xorsign ? std::copysign(r, s) : r;
  }
  if (x != x || y != y) return i.nan ? (T)NAN : x != x ? y : x;
  if (x == y) return std::signbit(x) ? x : y;
  return x < y ? x : y;
}
template <class T>
static inline T fmax_(T x, T y, const Instruction& i) {
  if (i.xorsign || i.abs) {
    T s = std::signbit(x) != std::signbit(y) ? (T)-1 : (T)1;
    x = std::fabs(x);
    y = std::fabs(y);
    T r = x != x ? (i.nan ? x : y) : y != y ? (i.nan ? y : x) : std::max(x, y);
    return i.xorsign ? std::copysign(r, s) : r;
  }
  if (x != x || y != y) return i.nan ? (T)NAN : x != x ? y : x;
  if (x == y) return std::signbit(x) ? y : x;
  return x > y ? x : y;
}
template <int OP, bool FTZ, bool SAT>
__attribute__((noinline)) static void fLoop(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  const uint64_t* b = i.num_operands > 2 ? row(w, i.operands[2]) : a;
  const uint64_t* c = i.num_operands > 3 ? row(w, i.operands[3]) : a;
  bool three = i.num_operands > 3;
  for_each_lane(mask, [&](int l) {
    float x = std::bit_cast<float>((uint32_t)a[l]);
    float y = std::bit_cast<float>((uint32_t)b[l]);
    float z = std::bit_cast<float>((uint32_t)c[l]);
    float r = 0;
    if (FTZ) {
      x = ftzf(x);
      y = ftzf(y);
      z = ftzf(z);
    }
    switch (OP) {
      case FADD:
        r = x + y;
        if (three) r = r + z;
        break;
      case FSUB:
        r = x - y;
        break;
      case FMUL:
        r = x * y;
        break;
      case FFMA:
        r = __builtin_fmaf(x, y, z);
        break;
      case FDIV:
        r = x / y;
        break;
      case FMIN:
        r = fmin_(x, y, i);
        if (three) r = fmin_(r, z, i);
        break;
      case FMAX:
        r = fmax_(x, y, i);
        if (three) r = fmax_(r, z, i);
        break;
      case FRCP:
        r = 1.0f / x;
        break;
      case FSQRT:
        r = std::sqrt(x);
        break;
      case FRSQ:
        r = (float)(1.0 / std::sqrt((double)x));
        break;
      case FEX2:
        r = (float)std::exp2((double)x);
        break;
      case FLG2:
        r = (float)std::log2((double)x);
        break;
      case FSIN:
        r = (float)std::sin((double)x);
        break;
      case FCOS:
        r = (float)std::cos((double)x);
        break;
      case FTANH:
        r = (float)std::tanh((double)x);
        break;
    }
    if (FTZ) r = ftzf(r);
    if (SAT) r = satf(r);
    d[l] = canon(r);
  });
}
template <int OP>
static void hF32(Warp& w, const Instruction& i, uint32_t mask) {
  auto go = [&] {
    if (i.ftz) {
      if (i.sat)
        fLoop<OP, true, true>(w, i, mask);
      else
        fLoop<OP, true, false>(w, i, mask);
    } else {
      if (i.sat)
        fLoop<OP, false, true>(w, i, mask);
      else
        fLoop<OP, false, false>(w, i, mask);
    }
  };
  if (i.rounding != Rounding::kRn) {
    Mx g(i.rounding);
    go();
  } else
    go();
}
template <int OP>
__attribute__((noinline)) static void dLoop(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  const uint64_t* b = i.num_operands > 2 ? row(w, i.operands[2]) : a;
  const uint64_t* c = i.num_operands > 3 ? row(w, i.operands[3]) : a;
  for_each_lane(mask, [&](int l) {
    double x = std::bit_cast<double>(a[l]);
    double y = std::bit_cast<double>(b[l]);
    double z = std::bit_cast<double>(c[l]);
    double r = 0;
    switch (OP) {
      case FADD:
        r = x + y;
        break;
      case FSUB:
        r = x - y;
        break;
      case FMUL:
        r = x * y;
        break;
      case FFMA:
        r = __builtin_fma(x, y, z);
        break;
      case FDIV:
        r = x / y;
        break;
      case FMIN:
        r = fmin_(x, y, i);
        break;
      case FMAX:
        r = fmax_(x, y, i);
        break;
      case FRCP:
        r = 1.0 / x;
        break;
      case FSQRT:
        r = std::sqrt(x);
        break;
      case FRSQ:
        r = 1.0 / std::sqrt(x);
        break;
      default:
        r = 0;
    }
    if (i.sat) r = !(r > 0) ? 0 : r > 1 ? 1 : r;
    d[l] = canond(r);
  });
}
template <int OP>
static void hF64(Warp& w, const Instruction& i, uint32_t mask) {
  if (i.rounding != Rounding::kRn) {
    Mx g(i.rounding);
    dLoop<OP>(w, i, mask);
  } else
    dLoop<OP>(w, i, mask);
}
static void hNegF(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  Type t = i.type;
  bool ab = i.flag;
  for_each_lane(mask, [&](int l) {
    uint64_t v = a[l];
    switch (t) {
      case Type::kF64:
        v = ab ? v & ~(1ull << 63) : v ^ (1ull << 63);
        break;
      case Type::kF32: {
        if (i.ftz) v = std::bit_cast<uint32_t>(ftzf(std::bit_cast<float>((uint32_t)v)));
        v = ab ? (uint32_t)v & 0x7fffffffu : (uint32_t)v ^ 0x80000000u;
        if ((v & 0x7fffffff) > 0x7f800000) v = 0x7fffffff;
      } break;
      case Type::kF16:
      case Type::kBF16:
        v = ab ? (uint16_t)v & 0x7fff : (uint16_t)v ^ 0x8000;
        break;
      default:
        v = ab ? (uint32_t)v & 0x7fff7fffu : (uint32_t)v ^ 0x80008000u;
    }
    d[l] = v;
  });
}
template <bool BF>
static inline float hto(uint16_t v) {
  return BF ? bfloat16_to_float(v) : half_to_float(v);
}
template <bool BF>
static uint16_t halfOp(int op, const Instruction& i, uint16_t a, uint16_t b, uint16_t c) {
  float x = hto<BF>(a), y = hto<BF>(b), z = hto<BF>(c);
  if (i.ftz && !BF) {
    auto fz = [](float v) { return std::fabs(v) < 6.103515625e-05f ? std::copysign(0.f, v) : v; };
    x = fz(x);
    y = fz(y);
    z = fz(z);
  }
  uint16_t r;
  auto en = [&](double v) -> uint16_t {
    return (uint16_t)encode_float(v, BF ? Type::kBF16 : Type::kF16, Rounding::kRn, false);
  };
  auto fe = [&](float v) -> uint16_t { return BF ? f2bf(v) : f2h(v); };
  switch (op) {
    case FADD:
      r = BF ? en(sumOdd(x, y)) : fe(x + y);
      break;
    case FSUB:
      r = BF ? en(sumOdd(x, -y)) : fe(x - y);
      break;
    case FMUL:
      r = BF ? en((double)x * y) : fe(x * y);
      break;
    case FFMA:
      r = en(sumOdd((double)x * y, z));
      break;
    case FMIN:
      r = fe(fmin_(x, y, i));
      break;
    case FMAX:
      r = fe(fmax_(x, y, i));
      break;
    case FEX2:
      r = en(std::exp2((double)x));
      break;
    case FTANH:
      r = en(std::tanh((double)x));
      break;
    default:
      r = 0;
  }
  if (i.ftz && !BF && !(r & 0x7c00)) r &= 0x8000;
  if (i.sat) {
    float v = hto<BF>(r);
    r = fe(satf(v));
  }
  if (i.relu) {
    float v = hto<BF>(r);
    if (v != v)
      r = 0x7fff;
    else if (std::signbit(v))
      r = 0;
  }
  return r;
}
template <int OP, bool BF, bool X2>
static void hHalf(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  const uint64_t* b = i.num_operands > 2 ? row(w, i.operands[2]) : a;
  const uint64_t* c = i.num_operands > 3 ? row(w, i.operands[3]) : a;
  bool three = i.num_operands > 3 && OP != FFMA;
  auto one = [&](uint16_t x, uint16_t y, uint16_t z) {
    uint16_t r = halfOp<BF>(OP, i, x, y, z);
    if (three) r = halfOp<BF>(OP, i, r, z, z);
    return r;
  };
  for_each_lane(mask, [&](int l) {
    uint32_t x = (uint32_t)a[l];
    uint32_t y = (uint32_t)b[l];
    uint32_t z = (uint32_t)c[l];
    uint32_t r = one(x, y, z);
    if (X2) r |= (uint32_t)one(x >> 16, y >> 16, z >> 16) << 16;
    d[l] = r;
  });
}
template <int OP>
static void hF32x2(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  const uint64_t* b = row(w, i.operands[2]);
  const uint64_t* c = i.num_operands > 3 ? row(w, i.operands[3]) : a;
  Mx g(i.rounding);
  for_each_lane(mask, [&](int l) {
    uint64_t r = 0;
    for (int k = 0; k < 2; k++) {
      float x = std::bit_cast<float>((uint32_t)(a[l] >> (32 * k)));
      float y = std::bit_cast<float>((uint32_t)(b[l] >> (32 * k)));
      float z = std::bit_cast<float>((uint32_t)(c[l] >> (32 * k)));
      if (i.ftz) {
        x = ftzf(x);
        y = ftzf(y);
        z = ftzf(z);
      }
      float v = OP == FADD   ? x + y
                : OP == FSUB ? x - y
                : OP == FMUL ? x * y
                             : __builtin_fmaf(x, y, z);
      if (i.ftz) v = ftzf(v);
      r |= canon(v) << (32 * k);
    }
    d[l] = r;
  });
}
template <int OP>
static Handler pickF(Type t) {
  switch (t) {
    case Type::kF32:
      return hF32<OP>;
    case Type::kF64:
      return hF64<OP>;
    case Type::kF16:
      return hHalf<OP, false, false>;
    case Type::kF16x2:
      return hHalf<OP, false, true>;
    case Type::kBF16:
      return hHalf<OP, true, false>;
    case Type::kBF16x2:
      return hHalf<OP, true, true>;
    default:
      return nullptr;
  }
}
static void hCopysign(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  uint64_t s = i.type == Type::kF64 ? 1ull << 63 : 0x80000000u;
  for_each_lane(mask, [&](int l) {
    d[l] = low_bytes((b[l] & ~s) | (a[l] & s), i.type == Type::kF64 ? 8 : 4);
  });
}
static void hTestp(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[1]);
  uint32_t r = 0;
  for_each_lane(mask, [&](int l) {
    double x = decode_float(a[l], i.type);
    bool sub = i.type == Type::kF32 ? (x != 0 && std::fabs(x) < 1.1754943508222875e-38)
                                    : std::fpclassify(x) == FP_SUBNORMAL;
    bool v = false;
    switch (i.variant) {
      case 0:
        v = std::isfinite(x);
        break;
      case 1:
        v = std::isinf(x);
        break;
      case 2:
        v = !(x != x);
        break;
      case 3:
        v = x != x;
        break;
      case 4:
        v = std::isfinite(x) && !sub && x != 0;
        break;
      case 5:
        v = sub;
        break;
    }
    if (v) r |= 1u << l;
  });
  uint32_t& p = w.predicates[i.operands[0].index];
  p = (p & ~mask) | r;
}
// ---------------------------------------------------------------- compare
template <class T>
static inline uint32_t compare_rows(const uint64_t* a, const uint64_t* b, uint32_t mask,
                                    Comparison op, bool ftz) {
  uint32_t r = 0;
  (void)ftz;
#define CL(E)                                 \
  {                                           \
    for_each_lane(mask, [&](int l) {          \
      T x = from_register<T>(a[l]);           \
      T y = from_register<T>(b[l]);           \
      if constexpr (std::is_same_v<T, float>) \
        if (ftz) {                            \
          x = ftzf(x);                        \
          y = ftzf(y);                        \
        }                                     \
      r |= (uint32_t)(E) << l;                \
    });                                       \
    break;                                    \
  }
  switch (op) {
    case Comparison::kEq:
    CL(x == y) case Comparison::kNe:
      if constexpr (std::is_floating_point_v<T>)
      CL(x < y || x > y) else CL(x != y) case Comparison::kLt:
      case Comparison::kLo:
      CL(x < y) case Comparison::kLe:
      case Comparison::kLs:
      CL(x <= y) case Comparison::kGt:
      case Comparison::kHi:
      CL(x > y) case Comparison::kGe:
      case Comparison::kHs:
        CL(x >= y)
      case Comparison::kEqu:
      CL(!(x < y || x > y)) case Comparison::kNeu:
      CL(!(x == y)) case Comparison::kLtu:
      CL(!(x >= y)) case Comparison::kLeu:
      CL(!(x > y)) case Comparison::kGtu:
      CL(!(x <= y)) case Comparison::kGeu:
      CL(!(x < y)) case Comparison::kNum:
      CL(x == x && y == y) case Comparison::kNan:
        CL(x != x || y != y)
  }
  return r;
}
static uint32_t compareOp(Warp& w, const Instruction& i, uint32_t mask, int ia, int ib, int half) {
  const uint64_t *a = row(w, i.operands[ia]), *b = row(w, i.operands[ib]);
  Type t = i.source_type;
  uint64_t ta[32], tb[32];
  Comparison op = i.comparison;
  switch (t) {
    case Type::kF16:
    case Type::kBF16:
    case Type::kF16x2:
    case Type::kBF16x2:
      for_each_lane(mask, [&](int l) {
        uint16_t x = (uint16_t)(a[l] >> (16 * half));
        uint16_t y = (uint16_t)(b[l] >> (16 * half));
        bool bf = t == Type::kBF16 || t == Type::kBF16x2;
        ta[l] = to_register<float>(bf ? bfloat16_to_float(x) : half_to_float(x));
        tb[l] = to_register<float>(bf ? bfloat16_to_float(y) : half_to_float(y));
      });
      return compare_rows<float>(ta, tb, mask, op, false);
    case Type::kF32:
      return compare_rows<float>(a, b, mask, op, i.ftz);
    case Type::kF64:
      return compare_rows<double>(a, b, mask, op, false);
    case Type::kU8:
    case Type::kB8:
      return compare_rows<uint8_t>(a, b, mask, op, false);
    case Type::kS8:
      return compare_rows<int8_t>(a, b, mask, op, false);
    case Type::kU16:
    case Type::kB16:
      return compare_rows<uint16_t>(a, b, mask, op, false);
    case Type::kS16:
      return compare_rows<int16_t>(a, b, mask, op, false);
    case Type::kU32:
    case Type::kB32:
      return compare_rows<uint32_t>(a, b, mask, op, false);
    case Type::kS32:
      return (op == Comparison::kLo || op == Comparison::kLs || op == Comparison::kHi ||
              op == Comparison::kHs)
                 ? compare_rows<uint32_t>(a, b, mask, op, false)
                 : compare_rows<int32_t>(a, b, mask, op, false);
    case Type::kU64:
    case Type::kB64:
      return compare_rows<uint64_t>(a, b, mask, op, false);
    case Type::kS64:
      return compare_rows<int64_t>(a, b, mask, op, false);
    default:
      return 0;
  }
}
static uint32_t predVal(Warp& w, const Operand& o, uint32_t mask) {
  uint32_t v;
  if (o.kind == OperandKind::kPredicate)
    v = w.predicates[o.index];
  else {
    const uint64_t* a = row(w, o);
    v = 0;
    for_each_lane(mask, [&](int l) {
      if (a[l]) v |= 1u << l;
    });
  }
  return o.negated ? ~v : v;
}
static uint32_t boolC(int op, uint32_t a, uint32_t c) {
  return op == 1 ? a & c : op == 2 ? a | c : op == 3 ? a ^ c : a;
}
static void hSetp(Warp& w, const Instruction& i, uint32_t mask) {
  bool x2 = i.source_type == Type::kF16x2 || i.source_type == Type::kBF16x2;
  uint32_t r = compareOp(w, i, mask, 1, 2, 0), q = x2 ? compareOp(w, i, mask, 1, 2, 1) : ~r;
  uint32_t c = i.num_operands > 3 ? predVal(w, i.operands[3], mask) : 0;
  auto st = [&](const Operand& o, uint32_t v) {
    if (o.kind == OperandKind::kPredicate) {
      uint32_t& p = w.predicates[o.index];
      p = (p & ~mask) | (v & mask);
    }
  };
  st(i.operands[0], boolC(i.bool_operation, r, c));
  if (i.has_second_output) st(i.second_output, boolC(i.bool_operation, q, c));
}
static void hSet(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  bool x2 = i.source_type == Type::kF16x2 || i.source_type == Type::kBF16x2;
  uint32_t c = i.num_operands > 3 ? predVal(w, i.operands[3], mask) : 0;
  uint32_t r = boolC(i.bool_operation, compareOp(w, i, mask, 1, 2, 0), c),
           q = x2 ? boolC(i.bool_operation, compareOp(w, i, mask, 1, 2, 1), c) : 0;
  for_each_lane(mask, [&](int l) {
    uint64_t v;
    bool t = (r >> l) & 1;
    bool u = (q >> l) & 1;
    switch (i.type) {
      case Type::kF32:
        v = t ? 0x3f800000u : 0;
        break;
      case Type::kF16:
        v = t ? 0x3c00 : 0;
        break;
      case Type::kBF16:
        v = t ? 0x3f80 : 0;
        break;
      case Type::kF16x2:
        v = (t ? 0x3c00u : 0) | (u ? 0x3c000000u : 0);
        break;
      case Type::kBF16x2:
        v = (t ? 0x3f80u : 0) | (u ? 0x3f800000u : 0);
        break;
      case Type::kU16:
      case Type::kS16:
        v = t ? 0xffff : 0;
        break;
      default:
        if (x2)
          v = (t ? 0xffffu : 0) | (u ? 0xffff0000u : 0);
        else
          v = t ? 0xffffffffu : 0;
    }
    d[l] = v;
  });
}
static void hSelp(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  uint32_t p = predVal(w, i.operands[3], mask);
  int sz = size_of(i.type);
  for_each_lane(mask, [&](int l) { d[l] = low_bytes((p >> l) & 1 ? a[l] : b[l], sz); });
}
static void hSlct(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  for_each_lane(mask, [&](int l) {
    bool t = i.source_type == Type::kF32
                 ? (i.ftz ? ftzf(from_register<float>(c[l])) : from_register<float>(c[l])) >= 0
                 : (int32_t)c[l] >= 0;
    d[l] = low_bytes(t ? a[l] : b[l], size_of(i.type));
  });
}
static void hPredOp(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t a = predVal(w, i.operands[1], mask),
           b = i.num_operands > 2 ? predVal(w, i.operands[2], mask) : 0, r = 0;
  switch (i.variant) {
    case 0:
      r = a & b;
      break;
    case 1:
      r = a | b;
      break;
    case 2:
      r = a ^ b;
      break;
    case 3:
      r = ~a;
      break;
    case 4:
      r = a;
      break;
  }
  uint32_t& p = w.predicates[i.operands[0].index];
  p = (p & ~mask) | (r & mask);
}
// ---------------------------------------------------------------- moves and bit operations
static void hMov(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  int sz = i.element_size;
  if (i.operands[1].in_frame) {
    for_each_lane(mask, [&](int l) { d[l] = a[l] + w.frame_local; });
    return;
  }
  if (sz == 4)
    for_each_lane(mask, [&](int l) { d[l] = (uint32_t)a[l]; });
  else if (sz == 8)
    for_each_lane(mask, [&](int l) { d[l] = a[l]; });
  else
    for_each_lane(mask, [&](int l) { d[l] = low_bytes(a[l], sz); });
}
static void hMovClock(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  uint64_t c = w.launch->statistics.warp_instructions * 4 + 1000;
  auto s = static_cast<SpecialRegister>(i.variant);
  uint64_t v = s == SpecialRegister::kClockHigh || s == SpecialRegister::kGlobalTimerHigh ? c >> 32
               : s == SpecialRegister::kClock ? (uint32_t)c
                                              : c;
  for_each_lane(mask, [&](int l) { d[l] = low_bytes(v, i.operands[0].width); });
}
static void hMov128(Warp& w, const Instruction& i, uint32_t mask) {
  Operand d0 = i.operands[0], a0 = i.operands[1];
  uint64_t* d = result_row(w, d0);
  const uint64_t* a = row(w, a0);
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l];
    uint64_t y = a[l + 32];
    d[l] = x;
    d[l + 32] = y;
  });
}
static void hPack(Warp& w, const Instruction& i, uint32_t mask) {  // mov.bN d, {a,b,...}
  uint64_t* d = result_row(w, i.operands[0]);
  int n = i.operands[1].count, eb = i.element_size;
  const uint64_t* s[8];
  for (int k = 0; k < n; k++) s[k] = row(w, i.elements[i.operands[1].first + k]);
  if (i.flag) {
    for_each_lane(mask, [&](int l) {
      uint64_t x = s[0][l];
      uint64_t y = s[1][l];
      if (n == 4) {
        x = (uint32_t)s[0][l] | s[1][l] << 32;
        y = (uint32_t)s[2][l] | s[3][l] << 32;
      }
      d[l] = x;
      d[l + 32] = y;
    });
    return;
  }
  for_each_lane(mask, [&](int l) {
    uint64_t v = 0;
    for (int k = 0; k < n; k++) v |= low_bytes(s[k][l], eb) << (8 * eb * k);
    d[l] = v;
  });
}
static void hUnpack(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[1]);
  int n = i.operands[0].count, eb = i.element_size;
  uint64_t* s[8];
  for (int k = 0; k < n; k++) s[k] = result_row(w, i.elements[i.operands[0].first + k]);
  if (i.flag) {
    for_each_lane(mask, [&](int l) {
      uint64_t x = a[l];
      uint64_t y = a[l + 32];
      if (n == 2) {
        s[0][l] = x;
        s[1][l] = y;
      } else {
        s[0][l] = (uint32_t)x;
        s[1][l] = x >> 32;
        s[2][l] = (uint32_t)y;
        s[3][l] = y >> 32;
      }
    });
    return;
  }
  for_each_lane(mask, [&](int l) {
    uint64_t v = a[l];
    for (int k = 0; k < n; k++) s[k][l] = low_bytes(v >> (8 * eb * k), eb);
  });
}
static void hLop3(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  uint32_t lut = (uint32_t)i.immediate;
  uint32_t pr = 0;
  uint32_t q = i.flag ? predVal(w, i.operands[5], mask) : 0;
  for_each_lane(mask, [&](int l) {
    uint32_t x = (uint32_t)a[l];
    uint32_t y = (uint32_t)b[l];
    uint32_t z = (uint32_t)c[l];
    uint32_t r = 0;
    if (lut & 1) r |= ~x & ~y & ~z;
    if (lut & 2) r |= ~x & ~y & z;
    if (lut & 4) r |= ~x & y & ~z;
    if (lut & 8) r |= ~x & y & z;
    if (lut & 16) r |= x & ~y & ~z;
    if (lut & 32) r |= x & ~y & z;
    if (lut & 64) r |= x & y & ~z;
    if (lut & 128) r |= x & y & z;
    d[l] = r;
    if (r) pr |= 1u << l;
  });
  if (i.flag && i.has_second_output && i.second_output.kind == OperandKind::kPredicate) {
    uint32_t v = i.bool_operation == 1 ? pr & q : pr | q;
    uint32_t& p = w.predicates[i.second_output.index];
    p = (p & ~mask) | (v & mask);
  }
}
static void hShf(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  bool left = i.flag, clampm = i.second_flag;
  for_each_lane(mask, [&](int l) {
    uint32_t n = (uint32_t)c[l];
    n = clampm ? std::min(n, 32u) : n & 31;
    uint64_t v = ((uint64_t)(uint32_t)b[l] << 32) | (uint32_t)a[l];
    d[l] = left ? (uint32_t)((v << n) >> 32) : n == 32 ? (uint32_t)b[l] : (uint32_t)(v >> n);
    if (left && n == 32) d[l] = (uint32_t)a[l];
  });
}
static void hBfe(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  bool sg = is_signed(i.type);
  int W = size_of(i.type) * 8, msb = W - 1;
  for_each_lane(mask, [&](int l) {
    uint64_t v = W == 32 ? (uint32_t)a[l] : a[l];
    int pos = b[l] & 0xff;
    int len = c[l] & 0xff;
    uint64_t sb;
    if (!sg || len == 0)
      sb = 0;
    else
      sb = (v >> std::min(pos + len - 1, msb)) & 1;
    uint64_t r = 0;
    for (int k = 0; k < W; k++) {
      uint64_t bit = (k < len && pos + k <= msb) ? (v >> (pos + k)) & 1 : sb;
      r |= bit << k;
    }
    d[l] = r;
  });
}
static void hBfi(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]),
                 *e = row(w, i.operands[4]);
  int W = size_of(i.type) * 8;
  for_each_lane(mask, [&](int l) {
    uint64_t v = low_bytes(b[l], W / 8);
    int pos = c[l] & 0xff;
    int len = e[l] & 0xff;
    for (int k = 0; k < len && pos + k < W; k++)
      v = (v & ~(1ull << (pos + k))) | (((a[l] >> k) & 1) << (pos + k));
    d[l] = v;
  });
}
static void hBits(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  int W = size_of(i.type) * 8;
  for_each_lane(mask, [&](int l) {
    uint64_t v = low_bytes(a[l], W / 8);
    uint64_t r = 0;
    switch (i.variant) {
      case 0:
        r = v ? __builtin_clzll(v) - (64 - W) : W;
        break;
      case 1:
        r = __builtin_popcountll(v);
        break;
      case 2: {
        for (int k = 0; k < W; k++) r |= ((v >> k) & 1) << (W - 1 - k);
        break;
      }
      case 3: {
        if (is_signed(i.type) && ((v >> (W - 1)) & 1)) v = low_bytes(~v, W / 8);
        r = v ? 63 - __builtin_clzll(v) : 0xffffffffu;
        if (v && i.flag) r = (W - 1) - r;
        break;
      }
    }
    d[l] = low_bytes(r, i.variant == 2 ? W / 8 : 4);
  });
}
static void hPrmt(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  for_each_lane(mask, [&](int l) {
    uint64_t v = (uint32_t)a[l] | (b[l] << 32);
    uint32_t s = (uint32_t)c[l];
    uint32_t r = 0;
    if (i.variant) {
      static const uint16_t f4e[4] = {0x3210, 0x4321, 0x5432, 0x6543},
                            b4e[4] = {0x5670, 0x6701, 0x7012, 0x0123},
                            rc8[4] = {0x0000, 0x1111, 0x2222, 0x3333},
                            ecl[4] = {0x3210, 0x3211, 0x3222, 0x3333},
                            ecr[4] = {0x0000, 0x1110, 0x2210, 0x3210},
                            rc16[4] = {0x1010, 0x3232, 0x1010, 0x3232};
      const uint16_t* tt[] = {f4e, f4e, b4e, rc8, ecl, ecr, rc16};
      s = tt[i.variant][s & 3];
    }
    for (int k = 0; k < 4; k++) {
      uint32_t n = (s >> (4 * k)) & 15;
      uint32_t by = (v >> (8 * (n & 7))) & 0xff;
      if (n & 8) by = by & 0x80 ? 0xff : 0;
      r |= by << (8 * k);
    }
    d[l] = r;
  });
}
static void hSad(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  int sz = size_of(i.type);
  bool sg = is_signed(i.type);
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l];
    uint64_t y = b[l];
    bool lt;
    if (sg) {
      int64_t sx = sz == 2 ? (int16_t)x : sz == 4 ? (int32_t)x : (int64_t)x;
      int64_t sy = sz == 2 ? (int16_t)y : sz == 4 ? (int32_t)y : (int64_t)y;
      lt = sx < sy;
      x = sx;
      y = sy;
    } else {
      x = low_bytes(x, sz);
      y = low_bytes(y, sz);
      lt = x < y;
    }
    d[l] = low_bytes(c[l] + (lt ? y - x : x - y), sz);
  });
}
static void hFns(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  for_each_lane(mask, [&](int l) {
    uint32_t m = (uint32_t)a[l];
    uint32_t base = (uint32_t)b[l];
    int32_t off = (int32_t)c[l];
    uint32_t r = 0xffffffffu;
    if (base < 32) {
      if (off == 0) {
        if ((m >> base) & 1) r = base;
      } else {
        int pos = (int)base;
        int step = off > 0 ? 1 : -1;
        int cnt = off > 0 ? off - 1 : -off - 1;
        for (; pos >= 0 && pos < 32; pos += step)
          if ((m >> pos) & 1) {
            if (cnt == 0) {
              r = pos;
              break;
            }
            cnt--;
          }
      }
    }
    d[l] = r;
  });
}
static void hDp(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  bool sa = i.type == Type::kS32, sb = i.source_type == Type::kS32;
  for_each_lane(mask, [&](int l) {
    uint32_t r = (uint32_t)c[l];
    int n = i.variant ? 2 : 4;
    for (int k = 0; k < n; k++) {
      int32_t x;
      int bk;
      if (i.variant) {
        x = sa ? (int32_t)(int16_t)(a[l] >> (16 * k)) : (int32_t)(uint16_t)(a[l] >> (16 * k));
        bk = k + (i.flag ? 2 : 0);
      } else {
        x = sa ? (int32_t)(int8_t)(a[l] >> (8 * k)) : (int32_t)(uint8_t)(a[l] >> (8 * k));
        bk = k;
      }
      int32_t y = sb ? (int32_t)(int8_t)(b[l] >> (8 * bk)) : (int32_t)(uint8_t)(b[l] >> (8 * bk));
      r += (uint32_t)(x * y);
    }
    d[l] = r;
  });
}
static void hBmsk(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  for_each_lane(mask, [&](int l) {
    uint32_t x = (uint32_t)a[l];
    uint32_t y = (uint32_t)b[l];
    if (i.flag) {
      x = std::min(x, 32u);
      y = std::min(y, 32u);
    } else {
      x &= 31;
      y &= 31;
    }
    uint64_t m = ((1ull << y) - 1) << x;
    d[l] = (uint32_t)m;
  });
}
static void hSzext(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  for_each_lane(mask, [&](int l) {
    uint32_t n = (uint32_t)b[l];
    n = i.flag ? std::min(n, 32u) : n & 31;
    uint32_t v = (uint32_t)a[l];
    if (n == 0)
      v = 0;
    else if (n < 32) {
      v &= (1u << n) - 1;
      if (i.type == Type::kS32 && (v >> (n - 1)) & 1) v |= ~((1u << n) - 1);
    }
    d[l] = v;
  });
}
template <bool S, int OP>
static void hI16x2(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  for_each_lane(mask, [&](int l) {
    uint32_t r = 0;
    for (int k = 0; k < 2; k++) {
      int32_t x = S ? (int32_t)(int16_t)(a[l] >> (16 * k)) : (int32_t)(uint16_t)(a[l] >> (16 * k));
      int32_t y = S ? (int32_t)(int16_t)(b[l] >> (16 * k)) : (int32_t)(uint16_t)(b[l] >> (16 * k));
      int32_t v = OP == 0 ? x + y : OP == 1 ? std::min(x, y) : std::max(x, y);
      if (i.relu && v < 0) v = 0;
      r |= (uint32_t)(uint16_t)v << (16 * k);
    }
    d[l] = r;
  });
}
// ---------------------------------------------------------------- convert
static uint64_t f2i(double x, Type dt, Rounding rnd, Type st) {
  int bits = size_of(dt) * 8;
  bool sg = is_signed(dt);
  if (x != x) return (st == Type::kF64 || bits == 64) ? low_bytes(1ull << (bits - 1), bits / 8) : 0;
  switch (rnd) {
    case Rounding::kRzi:
    case Rounding::kRz:
      x = std::trunc(x);
      break;
    case Rounding::kRmi:
    case Rounding::kRm:
      x = std::floor(x);
      break;
    case Rounding::kRpi:
    case Rounding::kRp:
      x = std::ceil(x);
      break;
    default:
      x = std::nearbyint(x);
  }
  if (sg) {
    double lo = -std::ldexp(1.0, bits - 1), hi = std::ldexp(1.0, bits - 1);
    if (x < lo)
      return low_bytes((uint64_t)1 << (bits - 1), 8) | (bits < 64 ? ~0ull << (bits - 1) : 0);
    if (x >= hi) return (1ull << (bits - 1)) - 1;
    return (uint64_t)(int64_t)x;
  }
  if (x <= 0) return 0;
  if (x >= std::ldexp(1.0, bits)) return bits == 64 ? ~0ull : (1ull << bits) - 1;
  return (uint64_t)x;
}
static inline uint64_t extTo(uint64_t v, Type t, int w) {
  switch (t) {
    case Type::kS8:
      v = (uint64_t)(int64_t)(int8_t)v;
      break;
    case Type::kS16:
      v = (uint64_t)(int64_t)(int16_t)v;
      break;
    case Type::kS32:
      v = (uint64_t)(int64_t)(int32_t)v;
      break;
    default:
      v = low_bytes(v, size_of(t));
  }
  return low_bytes(v, w);
}
static uint64_t cvtOne(const Instruction& i, uint64_t a) {
  Type d = i.type, s = i.source_type;
  bool df = is_floating(d), sf = is_floating(s);
  if (!df && !sf) {
    uint64_t v = extTo(a, s, 8);
    if (i.sat) {
      int bits = size_of(d) * 8;
      if (is_signed(s)) {
        int64_t x = (int64_t)v;
        if (is_signed(d)) {
          int64_t hi = bits == 64 ? INT64_MAX : (1ll << (bits - 1)) - 1;
          x = x > hi ? hi : x < -hi - 1 ? -hi - 1 : x;
        } else {
          if (x < 0) x = 0;
          if (bits < 64 && (uint64_t)x > (1ull << bits) - 1) x = (int64_t)((1ull << bits) - 1);
        }
        v = (uint64_t)x;
      } else {
        uint64_t hi = is_signed(d) ? (1ull << (bits - 1)) - 1
                      : bits == 64 ? ~0ull
                                   : (1ull << bits) - 1;
        if (v > hi) v = hi;
      }
    }
    return extTo(v, d, i.operands[0].width);
  }
  if (!df) {
    double x = decode_float(a, s);
    if (i.ftz && s == Type::kF32) x = ftzf((float)x);
    return extTo(f2i(x, d, i.rounding, s), d, i.operands[0].width);
  }
  if (!sf) {
    uint64_t v = extTo(a, s, 8);
    bool sg = is_signed(s);
    uint64_t r;
    if (d == Type::kF32) {
      volatile float f;
      {
        Mx g(i.rounding);
        if (sg)
          f = (float)(int64_t)v;
        else
          f = (float)v;
      }
      r = std::bit_cast<uint32_t>((float)f);
    } else if (d == Type::kF64) {
      volatile double f;
      {
        Mx g(i.rounding);
        if (sg)
          f = (double)(int64_t)v;
        else
          f = (double)v;
      }
      r = std::bit_cast<uint64_t>((double)f);
    } else {  // half: a 64-bit integer is rounded to odd in double first
      bool neg = sg && (int64_t)v < 0;
      uint64_t m = neg ? 0 - v : v;
      double x = (double)(m >> 11) * 2048.0 + ((m & 2047) ? 1 : 0) * 0.0;
      if (m < (1ull << 53))
        x = (double)m;
      else {
        x = (double)((m >> 12) | ((m & 4095) ? 1 : 0)) * 4096.0;
      }
      r = encode_float(neg ? -x : x, d, i.rounding, false);
    }
    if (i.sat) {
      double x = decode_float(r, d);
      x = !(x > 0) ? 0 : x > 1 ? 1 : x;
      r = encode_float(x, d, Rounding::kRn, false);
    }
    return r;
  }
  double x = decode_float(a, s);
  if (i.ftz && s == Type::kF32) x = ftzf((float)x);
  if (i.rounding >= Rounding::kRni && i.rounding <= Rounding::kRpi) {
    switch (i.rounding) {
      case Rounding::kRni:
        x = std::nearbyint(x);
        break;
      case Rounding::kRzi:
        x = std::trunc(x);
        break;
      case Rounding::kRmi:
        x = std::floor(x);
        break;
      default:
        x = std::ceil(x);
    }
  }
  if (i.sat) x = !(x > 0) ? 0 : x > 1 ? 1 : x;
  if (i.relu && x < 0) x = 0;
  if (i.relu && x == 0) x = 0;
  uint64_t r;
  if (d == Type::kF32 && s != Type::kF64)
    r = canon((float)x);
  else if (d == Type::kF64)
    r = canond(x);
  else if (d == Type::kBF16 && i.rounding == Rounding::kRn && !i.flag)
    r = s == Type::kF32 || s == Type::kF16 || s == Type::kBF16
            ? f2bf((float)x)
            : encode_float(x, d, Rounding::kRn, false);
  else
    r = encode_float(x, d, i.rounding >= Rounding::kRni ? Rounding::kRn : i.rounding, i.flag);
  if (d == Type::kF32 && i.ftz)
    r = std::bit_cast<uint32_t>(ftzf(std::bit_cast<float>((uint32_t)r)));
  return r;
}
static void hCvt(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  if (i.type == Type::kF32 && i.source_type == Type::kF16) {
    for_each_lane(mask, [&](int l) { d[l] = canon(half_to_float((uint16_t)a[l])); });
    return;
  }
  if (i.type == Type::kF32 && i.source_type == Type::kBF16) {
    for_each_lane(mask, [&](int l) { d[l] = canon(bfloat16_to_float((uint16_t)a[l])); });
    return;
  }
  if (i.variant == 1) {
    if (i.type == Type::kU64 && i.source_type == Type::kU32)
      for_each_lane(mask, [&](int l) { d[l] = (uint32_t)a[l]; });
    else if (i.type == Type::kS64 && i.source_type == Type::kS32)
      for_each_lane(mask, [&](int l) { d[l] = (uint64_t)(int64_t)(int32_t)a[l]; });
    else
      for_each_lane(mask, [&](int l) { d[l] = (uint32_t)a[l]; });
    return;
  }
  for_each_lane(mask, [&](int l) { d[l] = cvtOne(i, a[l]); });
}
static void hCvtPack2(Warp& w, const Instruction& i,
                      uint32_t mask) {  // two f32 -> packed, or packed <-> packed
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  const uint64_t* b = i.num_operands > 2 ? row(w, i.operands[2]) : a;
  Type e = i.type == Type::kF16x2    ? Type::kF16
           : i.type == Type::kBF16x2 ? Type::kBF16
           : i.type == Type::kE4M3x2 ? Type::kE4M3
                                     : Type::kE5M2;
  int W = size_of(i.type) * 4;
  bool sf = i.flag;
  auto fix = [&](double x) {
    if (i.relu && (x < 0 || x == 0)) x = 0;
    return x;
  };
  if (i.source_type == Type::kF32) {
    for_each_lane(mask, [&](int l) {
      double x = fix(from_register<float>(a[l]));
      double y = fix(from_register<float>(b[l]));
      uint64_t hi;
      uint64_t lo;
      if (e == Type::kBF16 && i.rounding == Rounding::kRn && !sf) {
        hi = f2bf((float)x);
        lo = f2bf((float)y);
      } else if (e == Type::kF16 && i.rounding == Rounding::kRn && !sf) {
        hi = f2h((float)x);
        lo = f2h((float)y);
      } else {
        hi = encode_float(x, e, i.rounding, sf);
        lo = encode_float(y, e, i.rounding, sf);
      }
      d[l] = (hi << W) | lo;
    });
    return;
  }
  Type se = i.source_type == Type::kF16x2    ? Type::kF16
            : i.source_type == Type::kBF16x2 ? Type::kBF16
            : i.source_type == Type::kE4M3x2 ? Type::kE4M3
                                             : Type::kE5M2;
  int SW = size_of(i.source_type) * 4;
  uint64_t sm = (1ull << SW) - 1;
  for_each_lane(mask, [&](int l) {
    uint64_t v = a[l];
    uint64_t lo = encode_float(fix(decode_float(v & sm, se)), e, i.rounding, sf);
    uint64_t hi = encode_float(fix(decode_float((v >> SW) & sm, se)), e, i.rounding, sf);
    d[l] = (hi << W) | lo;
  });
}
static void hCvtPackI(Warp& w, const Instruction& i,
                      uint32_t mask) {  // cvt.pack.sat.{uint16_t,int16_t,uint8_t,int8_t}.int32_t: a
                                        // above b, c above both
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  const uint64_t* c = i.num_operands > 3 ? row(w, i.operands[3]) : nullptr;
  int bits = size_of(i.type) * 8;
  bool sg = is_signed(i.type);
  auto st = [&](uint64_t v) -> uint32_t {
    int64_t x = (int32_t)v, hi = sg ? (1ll << (bits - 1)) - 1 : (1ll << bits) - 1,
            lo = sg ? -(1ll << (bits - 1)) : 0;
    x = x < lo ? lo : x > hi ? hi : x;
    return (uint32_t)x & ((1u << bits) - 1);
  };
  for_each_lane(mask, [&](int l) {
    uint32_t r = st(a[l]) << bits | st(b[l]);
    if (c) r |= (uint32_t)c[l] << (2 * bits);
    d[l] = r;
  });
}
static void hNop(Warp& w, const Instruction&, uint32_t) { (void)w; }
static void hFence(Warp& w, const Instruction&, uint32_t) { w.launch->statistics.fences++; }
static void hZero64(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  for_each_lane(mask, [&](int l) { d[l] = 0; });
}

// ---------------------------------------------------------------- decode
bool decode_arithmetic(const ParsedInstruction& p, Instruction& i) {
  const std::string& op = p.opcode;
  Type t = i.type;
  bool fl = is_floating(t) || t == Type::kF32x2;
  auto is = [&](const char* s) { return op == s; };
  if (is("mov")) {
    if (p.operands.size() != 2) return false;
    if (t == Type::kPred) {
      i.variant = 4;
      i.execute = hPredOp;
      return true;
    }
    if (p.operands[1].kind == OperandKind::kSpecialRegister &&
        p.operands[1].index >= static_cast<int>(SpecialRegister::kClock)) {
      i.variant = p.operands[1].index;
      i.execute = hMovClock;
      return true;
    }
    if (p.operands[1].kind == OperandKind::kVector) {
      i.element_size = size_of(t) / (int)p.operands[1].elements.size();
      i.flag = t == Type::kB128;
      i.execute = hPack;
      return true;
    }
    if (p.operands[0].kind == OperandKind::kVector) {
      i.element_size = size_of(t) / (int)p.operands[0].elements.size();
      i.flag = t == Type::kB128;
      i.execute = hUnpack;
      return true;
    }
    if (t == Type::kB128) {
      i.execute = hMov128;
      return true;
    }
    i.element_size = size_of(t);
    i.execute = hMov;
    return true;
  }
  if (is("add") || is("addc") || is("sub") || is("subc")) {
    bool sub = op[0] == 's', carry = op.size() == 4, cc = p.has("cc");
    if (carry || cc) {
      i.carry_in = carry;
      i.carry_out = cc;
      bool w = size_of(t) == 8;
      i.execute = sub ? (w ? (Handler)hCarry<uint64_t, 1> : hCarry<uint32_t, 1>)
                      : (w ? (Handler)hCarry<uint64_t, 0> : hCarry<uint32_t, 0>);
      return true;
    }
    if (t == Type::kF32x2) {
      i.execute = sub ? (Handler)hF32x2<FSUB> : hF32x2<FADD>;
      return true;
    }
    if (t == Type::kU16x2 || t == Type::kS16x2) {
      i.execute = hI16x2<false, 0>;
      return !sub;
    }
    if (fl) {
      i.execute = sub ? pickF<FSUB>(t) : pickF<FADD>(t);
      return true;
    }
    if (i.sat && t == Type::kS32) {
      i.execute = sub ? (Handler)hBin<int32_t, ISubSat> : hBin<int32_t, IAddSat>;
      return true;
    }
    i.execute = sub ? PICK(t, hBin, ISub) : PICK(t, hBin, IAdd);
    return true;
  }
  if (is("mul") || is("mad") || is("madc")) {
    if (t == Type::kF32x2) {
      i.execute = hF32x2<FMUL>;
      return true;
    }
    if (fl) {
      i.execute = is("mul") ? pickF<FMUL>(t) : pickF<FFMA>(t);
      return true;
    }
    bool mad = op[1] == 'a', wide = p.has("wide"), hi = p.has("hi");
    if (is("madc") || p.has("cc")) {
      i.carry_in = is("madc");
      i.carry_out = p.has("cc");
      i.second_flag = is_signed(t);
      bool w = size_of(t) == 8;
      i.execute = hi ? (w ? (Handler)hCarry<uint64_t, 3> : hCarry<uint32_t, 3>)
                     : (w ? (Handler)hCarry<uint64_t, 2> : hCarry<uint32_t, 2>);
      return true;
    }
    if (wide) {
      switch (t) {
        case Type::kU16:
          i.execute =
              mad ? (Handler)hWide<uint16_t, uint32_t, true> : hWide<uint16_t, uint32_t, false>;
          break;
        case Type::kS16:
          i.execute = mad ? (Handler)hWide<int16_t, int32_t, true> : hWide<int16_t, int32_t, false>;
          break;
        case Type::kU32:
        case Type::kB32:
          i.execute =
              mad ? (Handler)hWide<uint32_t, uint64_t, true> : hWide<uint32_t, uint64_t, false>;
          break;
        case Type::kS32:
          i.execute = mad ? (Handler)hWide<int32_t, int64_t, true> : hWide<int32_t, int64_t, false>;
          break;
        default:
          return false;
      }
      return true;
    }
    if (mad && hi && i.sat) {
      i.execute = hMadHiSat<int32_t>;
      return true;
    }
    if (mad)
      i.execute = hi ? PICK(t, hMad, IMulHi) : PICK(t, hMad, IMulLo);
    else
      i.execute = hi ? PICK(t, hBin, IMulHi) : PICK(t, hBin, IMulLo);
    return true;
  }
  if (is("mul24") || is("mad24")) {
    bool S = t == Type::kS32, H = p.has("hi"), M = is("mad24");
    i.execute = S ? (H ? (M ? (Handler)h24<1, 1, 1> : h24<1, 1, 0>)
                       : (M ? (Handler)h24<1, 0, 1> : h24<1, 0, 0>))
                  : (H ? (M ? (Handler)h24<0, 1, 1> : h24<0, 1, 0>)
                       : (M ? (Handler)h24<0, 0, 1> : h24<0, 0, 0>));
    return true;
  }
  if (is("fma")) {
    i.execute = t == Type::kF32x2 ? (Handler)hF32x2<FFMA> : pickF<FFMA>(t);
    return true;
  }
  if (is("div")) {
    i.execute = fl ? pickF<FDIV>(t) : PICK(t, hBin, IDiv);
    if (fl && t != Type::kF32 && t != Type::kF64) return false;
    return true;
  }
  if (is("rem")) {
    i.execute = PICK(t, hBin, IRem);
    return true;
  }
  if (is("min") || is("max")) {
    bool mn = is("min");
    if (t == Type::kU16x2) {
      i.execute = mn ? (Handler)hI16x2<false, 1> : hI16x2<false, 2>;
      return true;
    }
    if (t == Type::kS16x2) {
      i.execute = mn ? (Handler)hI16x2<true, 1> : hI16x2<true, 2>;
      return true;
    }
    if (fl) {
      i.execute = mn ? pickF<FMIN>(t) : pickF<FMAX>(t);
      return true;
    }
    if (i.relu) {
      i.execute = mn ? (Handler)hBin<int32_t, IMinRelu> : hBin<int32_t, IMaxRelu>;
      return t == Type::kS32;
    }
    if (p.operands.size() == 4) {
      i.execute = mn ? PICK(t, hTri, IMin) : PICK(t, hTri, IMax);
      return true;
    }
    i.execute = mn ? PICK(t, hBin, IMin) : PICK(t, hBin, IMax);
    return true;
  }
  if (is("abs") || is("neg")) {
    if (fl) {
      i.flag = is("abs");
      i.execute = hNegF;
      return true;
    }
    i.execute = is("abs") ? PICK(t, hUn, IAbs) : PICK(t, hUn, INeg);
    return true;
  }
  if (is("sad")) {
    i.execute = hSad;
    return true;
  }
  if (is("rcp")) {
    i.execute = t == Type::kF64 ? (Handler)hF64<FRCP> : hF32<FRCP>;
    return fl;
  }
  if (is("sqrt")) {
    i.execute = t == Type::kF64 ? (Handler)hF64<FSQRT> : hF32<FSQRT>;
    return fl;
  }
  if (is("rsqrt")) {
    i.execute = t == Type::kF64 ? (Handler)hF64<FRSQ> : hF32<FRSQ>;
    return fl;
  }
  if (is("ex2")) {
    i.execute = pickF<FEX2>(t);
    return t != Type::kF64;
  }
  if (is("lg2")) {
    i.execute = hF32<FLG2>;
    return t == Type::kF32;
  }
  if (is("sin")) {
    i.execute = hF32<FSIN>;
    return t == Type::kF32;
  }
  if (is("cos")) {
    i.execute = hF32<FCOS>;
    return t == Type::kF32;
  }
  if (is("tanh")) {
    i.execute = pickF<FTANH>(t);
    return t != Type::kF64;
  }
  if (is("copysign")) {
    i.execute = hCopysign;
    return true;
  }
  if (is("testp")) {
    static const char* n[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    for (int k = 0; k < 6; k++)
      if (p.has(n[k])) i.variant = k;
    i.execute = hTestp;
    return true;
  }
  if (is("and") || is("or") || is("xor")) {
    if (t == Type::kPred) {
      i.variant = op[0] == 'a' ? 0 : op[0] == 'o' ? 1 : 2;
      i.execute = hPredOp;
      return true;
    }
    i.execute = op[0] == 'a'   ? PICK(t, hBin, IAnd)
                : op[0] == 'o' ? PICK(t, hBin, IOr)
                               : PICK(t, hBin, IXor);
    return true;
  }
  if (is("not")) {
    if (t == Type::kPred) {
      i.variant = 3;
      i.execute = hPredOp;
      return true;
    }
    i.execute = PICK(t, hUn, INot);
    return true;
  }
  if (is("cnot")) {
    i.execute = PICK(t, hUn, ICnot);
    return true;
  }
  if (is("shl")) {
    i.execute = PICK(t, hShift, IShl);
    return true;
  }
  if (is("shr")) {
    i.execute = PICK(t, hShift, IShr);
    return true;
  }
  if (is("lop3")) {
    i.flag = p.operands.size() > 5;
    i.bool_operation = p.has("and") ? 1 : 2;
    i.immediate = (int)p.operands[4].integer;
    i.execute = hLop3;
    return true;
  }
  if (is("shf")) {
    i.flag = p.has("l");
    i.second_flag = p.has("clamp");
    i.execute = hShf;
    return true;
  }
  if (is("bfe")) {
    i.execute = hBfe;
    return true;
  }
  if (is("bfi")) {
    i.execute = hBfi;
    return true;
  }
  if (is("clz") || is("popc") || is("brev") || is("bfind")) {
    i.variant = is("clz") ? 0 : is("popc") ? 1 : is("brev") ? 2 : 3;
    i.flag = p.has("shiftamt");
    i.execute = hBits;
    return true;
  }
  if (is("prmt")) {
    static const char* n[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (int k = 1; k < 7; k++)
      if (p.has(n[k])) i.variant = k;
    i.execute = hPrmt;
    return true;
  }
  if (is("fns")) {
    i.execute = hFns;
    return true;
  }
  if (is("bmsk")) {
    i.flag = p.has("clamp");
    i.execute = hBmsk;
    return true;
  }
  if (is("szext")) {
    i.flag = p.has("clamp");
    i.execute = hSzext;
    return true;
  }
  if (is("dp4a") || is("dp2a")) {
    i.variant = is("dp2a");
    i.flag = p.has("hi");
    std::vector<Type> ts;
    for (auto& m : p.modifiers)
      if (parse_type(m) != Type::kNone) ts.push_back(parse_type(m));
    i.type = ts[0];
    i.source_type = ts[1];
    i.execute = hDp;
    return true;
  }
  if (is("setp") || is("set")) {
    static const char* n[] = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                              "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
    bool f = false;
    for (auto& m : p.modifiers) {
      for (int k = 0; k < 18; k++)
        if (m == n[k] && !f) {
          i.comparison = static_cast<Comparison>(k);
          f = true;
        }
      if (m == "and") i.bool_operation = 1;
      if (m == "or") i.bool_operation = 2;
      if (m == "xor") i.bool_operation = 3;
    }
    std::vector<Type> ts;
    for (auto& m : p.modifiers)
      if (parse_type(m) != Type::kNone) ts.push_back(parse_type(m));
    if (ts.empty() || !f) return false;
    i.source_type = ts.back();
    i.type = ts[0];
    i.execute = is("setp") ? hSetp : hSet;
    return true;
  }
  if (is("selp")) {
    i.execute = hSelp;
    return true;
  }
  if (is("slct")) {
    i.source_type =
        p.has("f32") && parse_type(p.modifiers.back()) == Type::kF32 ? Type::kF32 : Type::kS32;
    for (auto& m : p.modifiers)
      if (parse_type(m) != Type::kNone) {
        i.type = parse_type(m);
        break;
      }
    i.execute = hSlct;
    return true;
  }
  if (is("cvt") && p.has("pack")) {
    for (auto& m : p.modifiers)
      if (parse_type(m) != Type::kNone) {
        i.type = parse_type(m);
        break;
      }
    i.execute = hCvtPackI;
    return i.type == Type::kU8 || i.type == Type::kS8 || i.type == Type::kU16 ||
           i.type == Type::kS16;
  }
  if (is("cvt")) {
    std::vector<Type> ts;
    for (auto& m : p.modifiers)
      if (parse_type(m) != Type::kNone) ts.push_back(parse_type(m));
    if (ts.size() != 2) return false;
    i.type = ts[0];
    i.source_type = ts[1];
    i.flag = p.has("satfinite");
    bool fr = false;
    for (auto& m : p.modifiers) {
      if (m == "rna") {
        i.rounding = Rounding::kRna;
        fr = true;
      }
    }
    (void)fr;
    auto packed = [](Type x) {
      return x == Type::kF16x2 || x == Type::kBF16x2 || x == Type::kE4M3x2 || x == Type::kE5M2x2;
    };
    if (packed(i.type)) {
      if (i.type == Type::kE4M3x2 || i.type == Type::kE5M2x2) i.flag = true;
      if (p.has("rs")) return false;
      if (!(i.source_type == Type::kF32 ? p.operands.size() == 3 : packed(i.source_type)))
        return false;
      i.execute = hCvtPack2;
      return true;
    }
    if (packed(i.source_type)) return false;
    auto ok = [](Type x) {
      return (x >= Type::kU8 && x <= Type::kS64) || (x >= Type::kB8 && x <= Type::kB64) ||
             x == Type::kF16 || x == Type::kBF16 || x == Type::kF32 || x == Type::kF64 ||
             x == Type::kTF32;
    };
    if (!ok(i.type) || !ok(i.source_type)) return false;
    i.variant = !i.sat && ((i.type == Type::kU64 && i.source_type == Type::kU32) ||
                           (i.type == Type::kS64 && i.source_type == Type::kS32) ||
                           ((i.type == Type::kU32 || i.type == Type::kS32) &&
                            (i.source_type == Type::kU64 || i.source_type == Type::kS64) &&
                            i.operands[0].width == 4))
                    ? 1
                    : 0;
    i.execute = hCvt;
    return true;
  }
  if (is("membar") || is("fence")) {
    i.execute = hFence;
    return true;
  }
  if (is("prefetch") || is("prefetchu") || is("applypriority") || is("discard") ||
      is("griddepcontrol") || is("setmaxnreg") || is("pmevent") || is("brkpt")) {
    i.execute = hNop;
    return true;
  }
  if (is("createpolicy")) {
    i.execute = hZero64;
    return true;
  }
  return false;
}
}  // namespace mergeme::ptx
