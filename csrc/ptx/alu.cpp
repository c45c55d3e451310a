// alu.cpp - arithmetic, logic, compare, convert and move instructions.
#include <immintrin.h>
#include <cfenv>
#include "csrc/ptx/vm.h"

// ---------------------------------------------------------------- number formats
struct Fmt {
  int eb, mb;
  bool inf;
};
static Fmt fmtOf(Ty t) {
  switch (t) {
    case F16:
    case F16X2:
      return {5, 10, true};
    case BF16:
    case BF16X2:
      return {8, 7, true};
    case TF32:
      return {8, 10, true};
    case F32:
      return {8, 23, true};
    case E4M3:
    case E4M3X2:
      return {4, 3, false};
    case E5M2:
    case E5M2X2:
      return {5, 2, true};
    default:
      return {11, 52, true};
  }
}
u64 encF(double x, Ty t, int rnd, bool satf) {
  if (t == F64) return bitc<u64>(x);
  Fmt f = fmtOf(t);
  int bias = (1 << (f.eb - 1)) - 1;
  u64 sign = std::signbit(x) ? 1 : 0;
  u64 sbit = sign << (f.eb + f.mb);
  int shift = t == TF32 ? 13 : 0;
  u64 r;
  u64 infp = f.inf ? (((1ull << f.eb) - 1) << f.mb) : 0x7f, maxp = infp - 1;
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
        case RZ:
        case R_RZI:
          up = false;
          break;
        case RM:
          up = sign && rem > 0;
          break;
        case RP:
          up = !sign && rem > 0;
          break;
        case RNA:
          up = rem >= 0.5;
          break;
        default:
          up = rem > 0.5 || (rem == 0.5 && std::fmod(fl, 2.0) == 1.0);
      }
      u64 m = (u64)fl + (up ? 1 : 0);
      u64 b = ((u64)(E - (1 - bias)) << f.mb) + m;
      if (b >= infp)
        b = (satf || !f.inf || rnd == RZ || (rnd == RM && !sign) || (rnd == RP && sign)) ? maxp
                                                                                         : infp;
      r = sbit | b;
    }
  }
  if (x != x && t == TF32) return 0x7fffffff;
  return r << shift;
}
double decF(u64 b, Ty t) {
  switch (t) {
    case F16:
      return h2f((u16)b);
    case BF16:
      return b2f((u16)b);
    case F32:
    case TF32:
      return bitc<float>((u32)b);
    case F64:
      return bitc<double>(b);
    case E4M3: {
      u32 v = b & 0xff;
      double s = v & 0x80 ? -1 : 1;
      int e = (v >> 3) & 15, m = v & 7;
      if (e == 15 && m == 7) return NAN;
      return s * (e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9));
    }
    case E5M2: {
      u32 v = b & 0xff;
      double s = v & 0x80 ? -1 : 1;
      int e = (v >> 2) & 31, m = v & 3;
      if (e == 31) return m ? NAN : s * INFINITY;
      return s * (e ? std::ldexp(4 + m, e - 17) : std::ldexp(m, -16));
    }
    default:
      return 0;
  }
}
static inline u16 f2bf(float f) {
  u32 b = bitc<u32>(f);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline u16 f2h(float f) {
  if (f != f) return 0x7fff;
  return bitc<u16>((_Float16)f);
}
static inline float ftzf(float x) {
  u32 b = bitc<u32>(x);
  return (b & 0x7f800000) ? x : bitc<float>(b & 0x80000000u);
}
static inline u64 canon(float r) { return r != r ? 0x7fffffffu : bitc<u32>(r); }
static inline u64 canond(double r) { return r != r ? 0x7ff8000000000000ull : bitc<u64>(r); }
static inline float satf(float r) { return !(r > 0) ? 0.f : r > 1 ? 1.f : r; }
static double sumOdd(
    double p, double c) {  // p + c rounded to odd, so a later rounding to fewer bits is exact
  double s = p + c;
  if (!std::isfinite(s)) return s;
  double bb = s - p, e = (p - (s - bb)) + (c - bb);
  if (e != 0 && !(bitc<u64>(s) & 1))
    s = bitc<double>(bitc<u64>(s) + (((e > 0) == (s > 0)) ? 1 : -1));
  return s;
}
struct Mx {
  unsigned old;
  Mx(int rnd) {
    old = _mm_getcsr();
    unsigned m = rnd == RZ ? 3 : rnd == RM ? 1 : rnd == RP ? 2 : 0;
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
FN(IAnd, a& b) FN(IOr, a | b) FN(IXor, a ^ b) FN(IMin, a < b ? a : b) FN(IMax, a > b ? a : b)
    FN(IMulLo, (u64)a*(u64)b) FN(INot, ~a) FN(INeg, (U)0 - (U)a)
        FN(IAbs, a < 0 ? (U)0 - (U)a : (U)a) FN(ICnot, a == 0) struct IMulHi {
  template <class T>
  static inline T f(T a, T b) {
    if constexpr (sizeof(T) == 8) {
      if constexpr (std::is_signed_v<T>)
        return (T)(((__int128)a * b) >> 64);
      else
        return (T)(((unsigned __int128)a * b) >> 64);
    } else if constexpr (std::is_signed_v<T>)
      return (T)(((s64)a * b) >> (8 * sizeof(T)));
    else
      return (T)(((u64)a * b) >> (8 * sizeof(T)));
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
    s64 r = (s64)a + (s64)b;
    return r > INT32_MAX ? INT32_MAX : r < INT32_MIN ? INT32_MIN : (T)r;
  }
};
struct ISubSat {
  template <class T>
  static inline T f(T a, T b) {
    s64 r = (s64)a - (s64)b;
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
  static inline T f(T a, u32 b) {
    return b >= 8 * sizeof(T) ? 0 : (T)((std::make_unsigned_t<T>)a << b);
  }
};
struct IShr {
  template <class T>
  static inline T f(T a, u32 b) {
    if (b >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? (T)-1 : 0;
    return (T)(a >> b);
  }
};
template <class T, class F>
static void hBin(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  LANES(d[l] = put<T>(F::template f<T>((T)a[l], (T)b[l])););
}
template <class T, class F>
static void hUn(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  LANES(d[l] = put<T>(F::template f<T>((T)a[l], (T)0)););
}
template <class T, class F>
static void hTri(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  LANES(d[l] = put<T>(F::template f<T>(F::template f<T>((T)a[l], (T)b[l]), (T)c[l])););
}
template <class T, class F>
static void hShift(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  LANES(d[l] = put<T>(F::template f<T>((T)a[l], (u32)b[l])););
}
template <class T, class F>
static void hMad(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  LANES(d[l] = put<T>((T)((std::make_unsigned_t<T>)F::template f<T>((T)a[l], (T)b[l]) +
                          (std::make_unsigned_t<T>)c[l])););
}
template <class T>
static void hMadHiSat(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  LANES(d[l] = put<s32>(IAddSat::f<s32>(IMulHi::f<s32>((s32)a[l], (s32)b[l]), (s32)c[l])););
}
template <class T, class W, bool MAD>
static void hWide(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = MAD ? row(w, i.o[3]) : a;
  LANES(W r = (W)((u64)(s64)(W)(T)a[l] * (u64)(s64)(W)(T)b[l]);
        if (MAD) r = (W)((u64)r + (u64)(W)c[l]); d[l] = put<W>(r););
}
template <bool S, bool HI, bool MAD>
static void h24(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = MAD ? row(w, i.o[3]) : a;
  LANES(
      s64 x; s64 y; if (S) {
        x = (s32)((u32)a[l] << 8) >> 8;
        y = (s32)((u32)b[l] << 8) >> 8;
      } else {
        x = a[l] & 0xffffff;
        y = b[l] & 0xffffff;
      } u64 r = (u64)(x * y);
      u32 v = HI ? (u32)(r >> 16) : (u32)r; if (MAD) v += (u32)c[l]; d[l] = v;);
}
#define PICK(T4, H, ...)            \
  [&]() -> Handler {                \
    switch (T4) {                   \
      case U8:                      \
      case B8:                      \
        return H<u8, __VA_ARGS__>;  \
      case S8:                      \
        return H<s8, __VA_ARGS__>;  \
      case U16:                     \
      case B16:                     \
        return H<u16, __VA_ARGS__>; \
      case S16:                     \
        return H<s16, __VA_ARGS__>; \
      case U32:                     \
      case B32:                     \
        return H<u32, __VA_ARGS__>; \
      case S32:                     \
        return H<s32, __VA_ARGS__>; \
      case U64:                     \
      case B64:                     \
        return H<u64, __VA_ARGS__>; \
      case S64:                     \
        return H<s64, __VA_ARGS__>; \
      default:                      \
        return nullptr;             \
    }                               \
  }()
template <class U, int OP>
static void hCarry(Warp& w, const Inst& i, u32 mask) {  // OP 0 add, 1 sub, 2 mad.lo, 3 mad.hi
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = OP >= 2 ? row(w, i.o[3]) : a;
  u32 cc = w.cc;
  LANES(
      typedef unsigned __int128 X; U x = (U)a[l], y = (U)b[l];
      u32 cin = i.carry ? (cc >> l) & 1 : 0; X r; bool cout; if (OP >= 2) {
        X p;
        if (i.flag2)
          p = sizeof(U) == 8 ? (X)((__int128)(s64)x * (s64)y) : (X)((s64)(s32)x * (s64)(s32)y);
        else
          p = (X)x * y;
        U q = OP == 2 ? (U)p : (U)(p >> (8 * sizeof(U)));
        x = q;
        y = (U)c[l];
      } if (OP == 1) {
        r = (X)x - (X)y - cin;
        cout = (X)x < (X)y + cin;
      } else {
        r = (X)x + (X)y + cin;
        cout = (r >> (8 * sizeof(U))) & 1;
      } d[l] = (U)r;
      if (i.scc) cc = (cc & ~(1u << l)) | ((u32)cout << l););
  w.cc = cc;
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
static inline T fmin_(T x, T y, const Inst& i) {
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
static inline T fmax_(T x, T y, const Inst& i) {
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
__attribute__((noinline)) static void fLoop(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  const u64* b = i.no > 2 ? row(w, i.o[2]) : a;
  const u64* c = i.no > 3 ? row(w, i.o[3]) : a;
  bool three = i.no > 3;
  LANES(
      float x = bitc<float>((u32)a[l]); float y = bitc<float>((u32)b[l]);
      float z = bitc<float>((u32)c[l]); float r = 0; if (FTZ) {
        x = ftzf(x);
        y = ftzf(y);
        z = ftzf(z);
      } switch (OP) {
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
      } if (FTZ) r = ftzf(r);
      if (SAT) r = satf(r); d[l] = canon(r););
}
template <int OP>
static void hF32(Warp& w, const Inst& i, u32 mask) {
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
  if (i.rnd != RN) {
    Mx g(i.rnd);
    go();
  } else
    go();
}
template <int OP>
__attribute__((noinline)) static void dLoop(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  const u64* b = i.no > 2 ? row(w, i.o[2]) : a;
  const u64* c = i.no > 3 ? row(w, i.o[3]) : a;
  LANES(double x = bitc<double>(a[l]); double y = bitc<double>(b[l]); double z = bitc<double>(c[l]);
        double r = 0; switch (OP) {
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
        } if (i.sat) r = !(r > 0) ? 0
                         : r > 1  ? 1
                                  : r;
        d[l] = canond(r););
}
template <int OP>
static void hF64(Warp& w, const Inst& i, u32 mask) {
  if (i.rnd != RN) {
    Mx g(i.rnd);
    dLoop<OP>(w, i, mask);
  } else
    dLoop<OP>(w, i, mask);
}
static void hNegF(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  Ty t = i.ty;
  bool ab = i.flag;
  LANES(u64 v = a[l]; switch (t) {
    case F64:
      v = ab ? v & ~(1ull << 63) : v ^ (1ull << 63);
      break;
    case F32: {
      if (i.ftz) v = bitc<u32>(ftzf(bitc<float>((u32)v)));
      v = ab ? (u32)v & 0x7fffffffu : (u32)v ^ 0x80000000u;
      if ((v & 0x7fffffff) > 0x7f800000) v = 0x7fffffff;
    } break;
    case F16:
    case BF16:
      v = ab ? (u16)v & 0x7fff : (u16)v ^ 0x8000;
      break;
    default:
      v = ab ? (u32)v & 0x7fff7fffu : (u32)v ^ 0x80008000u;
  } d[l] = v;);
}
template <bool BF>
static inline float hto(u16 v) {
  return BF ? b2f(v) : h2f(v);
}
template <bool BF>
static u16 halfOp(int op, const Inst& i, u16 a, u16 b, u16 c) {
  float x = hto<BF>(a), y = hto<BF>(b), z = hto<BF>(c);
  if (i.ftz && !BF) {
    auto fz = [](float v) { return std::fabs(v) < 6.103515625e-05f ? std::copysign(0.f, v) : v; };
    x = fz(x);
    y = fz(y);
    z = fz(z);
  }
  u16 r;
  auto en = [&](double v) -> u16 { return (u16)encF(v, BF ? BF16 : F16, RN, false); };
  auto fe = [&](float v) -> u16 { return BF ? f2bf(v) : f2h(v); };
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
static void hHalf(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  const u64* b = i.no > 2 ? row(w, i.o[2]) : a;
  const u64* c = i.no > 3 ? row(w, i.o[3]) : a;
  bool three = i.no > 3 && OP != FFMA;
  auto one = [&](u16 x, u16 y, u16 z) {
    u16 r = halfOp<BF>(OP, i, x, y, z);
    if (three) r = halfOp<BF>(OP, i, r, z, z);
    return r;
  };
  LANES(u32 x = (u32)a[l]; u32 y = (u32)b[l]; u32 z = (u32)c[l]; u32 r = one(x, y, z);
        if (X2) r |= (u32)one(x >> 16, y >> 16, z >> 16) << 16; d[l] = r;);
}
template <int OP>
static void hF32x2(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  const u64* b = row(w, i.o[2]);
  const u64* c = i.no > 3 ? row(w, i.o[3]) : a;
  Mx g(i.rnd);
  LANES(u64 r = 0; for (int k = 0; k < 2; k++) {
    float x = bitc<float>((u32)(a[l] >> (32 * k)));
    float y = bitc<float>((u32)(b[l] >> (32 * k)));
    float z = bitc<float>((u32)(c[l] >> (32 * k)));
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
  } d[l] = r;);
}
template <int OP>
static Handler pickF(Ty t) {
  switch (t) {
    case F32:
      return hF32<OP>;
    case F64:
      return hF64<OP>;
    case F16:
      return hHalf<OP, false, false>;
    case F16X2:
      return hHalf<OP, false, true>;
    case BF16:
      return hHalf<OP, true, false>;
    case BF16X2:
      return hHalf<OP, true, true>;
    default:
      return nullptr;
  }
}
static void hCopysign(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  u64 s = i.ty == F64 ? 1ull << 63 : 0x80000000u;
  LANES(d[l] = maskw((b[l] & ~s) | (a[l] & s), i.ty == F64 ? 8 : 4););
}
static void hTestp(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[1]);
  u32 r = 0;
  LANES(double x = decF(a[l], i.ty);
        bool sub = i.ty == F32 ? (x != 0 && std::fabs(x) < 1.1754943508222875e-38)
                               : std::fpclassify(x) == FP_SUBNORMAL;
        bool v = false; switch (i.mode) {
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
        } if (v) r |= 1u << l;);
  u32& p = w.preds[i.o[0].idx];
  p = (p & ~mask) | r;
}
// ---------------------------------------------------------------- compare
template <class T>
static inline u32 cmpMask(const u64* a, const u64* b, u32 mask, int op, bool ftz) {
  u32 r = 0;
  (void)ftz;
#define CL(E)                                                \
  {                                                          \
    LANES(T x = get<T>(a[l]); T y = get<T>(b[l]);            \
          if constexpr (std::is_same_v<T, float>) if (ftz) { \
            x = ftzf(x);                                     \
            y = ftzf(y);                                     \
          } r |= (u32)(E) << l;);                            \
    break;                                                   \
  }
  switch (op) {
    case EQ:
    CL(x == y) case NE:
      if constexpr (std::is_floating_point_v<T>) CL(x < y || x > y) else CL(x != y) case LT:
      case LO:
      CL(x < y) case LE:
      case LS:
      CL(x <= y) case GT:
      case HI:
      CL(x > y) case GE:
      case HS:
        CL(x >= y)
      case EQU:
      CL(!(x < y || x > y)) case NEU:
      CL(!(x == y)) case LTU:
      CL(!(x >= y)) case LEU:
      CL(!(x > y)) case GTU:
      CL(!(x <= y)) case GEU:
      CL(!(x < y)) case NUM_:
      CL(x == x && y == y) case NAN_:
        CL(x != x || y != y)
  }
  return r;
}
static u32 compareOp(Warp& w, const Inst& i, u32 mask, int ia, int ib, int half) {
  const u64 *a = row(w, i.o[ia]), *b = row(w, i.o[ib]);
  Ty t = i.ty2;
  u64 ta[32], tb[32];
  int op = i.cmp;
  switch (t) {
    case F16:
    case BF16:
    case F16X2:
    case BF16X2:
      LANES(u16 x = (u16)(a[l] >> (16 * half)); u16 y = (u16)(b[l] >> (16 * half));
            bool bf = t == BF16 || t == BF16X2; ta[l] = put<float>(bf ? b2f(x) : h2f(x));
            tb[l] = put<float>(bf ? b2f(y) : h2f(y)););
      return cmpMask<float>(ta, tb, mask, op, false);
    case F32:
      return cmpMask<float>(a, b, mask, op, i.ftz);
    case F64:
      return cmpMask<double>(a, b, mask, op, false);
    case U8:
    case B8:
      return cmpMask<u8>(a, b, mask, op, false);
    case S8:
      return cmpMask<s8>(a, b, mask, op, false);
    case U16:
    case B16:
      return cmpMask<u16>(a, b, mask, op, false);
    case S16:
      return cmpMask<s16>(a, b, mask, op, false);
    case U32:
    case B32:
      return cmpMask<u32>(a, b, mask, op, false);
    case S32:
      return (op == LO || op == LS || op == HI || op == HS) ? cmpMask<u32>(a, b, mask, op, false)
                                                            : cmpMask<s32>(a, b, mask, op, false);
    case U64:
    case B64:
      return cmpMask<u64>(a, b, mask, op, false);
    case S64:
      return cmpMask<s64>(a, b, mask, op, false);
    default:
      return 0;
  }
}
static u32 predVal(Warp& w, const Opnd& o, u32 mask) {
  u32 v;
  if (o.kind == O_PRED)
    v = w.preds[o.idx];
  else {
    const u64* a = row(w, o);
    v = 0;
    LANES(if (a[l]) v |= 1u << l;);
  }
  return o.neg ? ~v : v;
}
static u32 boolC(int op, u32 a, u32 c) {
  return op == 1 ? a & c : op == 2 ? a | c : op == 3 ? a ^ c : a;
}
static void hSetp(Warp& w, const Inst& i, u32 mask) {
  bool x2 = i.ty2 == F16X2 || i.ty2 == BF16X2;
  u32 r = compareOp(w, i, mask, 1, 2, 0), q = x2 ? compareOp(w, i, mask, 1, 2, 1) : ~r;
  u32 c = i.no > 3 ? predVal(w, i.o[3], mask) : 0;
  auto st = [&](const Opnd& o, u32 v) {
    if (o.kind == O_PRED) {
      u32& p = w.preds[o.idx];
      p = (p & ~mask) | (v & mask);
    }
  };
  st(i.o[0], boolC(i.boolop, r, c));
  if (i.hasDual) st(i.dual, boolC(i.boolop, q, c));
}
static void hSet(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  bool x2 = i.ty2 == F16X2 || i.ty2 == BF16X2;
  u32 c = i.no > 3 ? predVal(w, i.o[3], mask) : 0;
  u32 r = boolC(i.boolop, compareOp(w, i, mask, 1, 2, 0), c),
      q = x2 ? boolC(i.boolop, compareOp(w, i, mask, 1, 2, 1), c) : 0;
  LANES(u64 v; bool t = (r >> l) & 1; bool u = (q >> l) & 1; switch (i.ty) {
    case F32:
      v = t ? 0x3f800000u : 0;
      break;
    case F16:
      v = t ? 0x3c00 : 0;
      break;
    case BF16:
      v = t ? 0x3f80 : 0;
      break;
    case F16X2:
      v = (t ? 0x3c00u : 0) | (u ? 0x3c000000u : 0);
      break;
    case BF16X2:
      v = (t ? 0x3f80u : 0) | (u ? 0x3f800000u : 0);
      break;
    case U16:
    case S16:
      v = t ? 0xffff : 0;
      break;
    default:
      if (x2)
        v = (t ? 0xffffu : 0) | (u ? 0xffff0000u : 0);
      else
        v = t ? 0xffffffffu : 0;
  } d[l] = v;);
}
static void hSelp(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  u32 p = predVal(w, i.o[3], mask);
  int sz = tySize(i.ty);
  LANES(d[l] = maskw((p >> l) & 1 ? a[l] : b[l], sz););
}
static void hSlct(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  LANES(bool t = i.ty2 == F32 ? (i.ftz ? ftzf(get<float>(c[l])) : get<float>(c[l])) >= 0
                              : (s32)c[l] >= 0;
        d[l] = maskw(t ? a[l] : b[l], tySize(i.ty)););
}
static void hPredOp(Warp& w, const Inst& i, u32 mask) {
  u32 a = predVal(w, i.o[1], mask), b = i.no > 2 ? predVal(w, i.o[2], mask) : 0, r = 0;
  switch (i.mode) {
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
  u32& p = w.preds[i.o[0].idx];
  p = (p & ~mask) | (r & mask);
}
// ---------------------------------------------------------------- moves and bit operations
static void hMov(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  int sz = i.esz;
  if (i.o[1].localRel) {
    LANES(d[l] = a[l] + w.frameLocal;);
    return;
  }
  if (sz == 4)
    LANES(d[l] = (u32)a[l];);
  else if (sz == 8)
    LANES(d[l] = a[l];);
  else
    LANES(d[l] = maskw(a[l], sz););
}
static void hMovClock(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  u64 c = w.L->steps * 4 + 1000;
  int s = i.mode;
  u64 v = s == SR_CLOCKHI || s == SR_GTIMERHI ? c >> 32 : s == SR_CLOCK ? (u32)c : c;
  LANES(d[l] = maskw(v, i.o[0].w););
}
static void hMov128(Warp& w, const Inst& i, u32 mask) {
  Opnd d0 = i.o[0], a0 = i.o[1];
  u64* d = rowd(w, d0);
  const u64* a = row(w, a0);
  LANES(u64 x = a[l]; u64 y = a[l + 32]; d[l] = x; d[l + 32] = y;);
}
static void hPack(Warp& w, const Inst& i, u32 mask) {  // mov.bN d, {a,b,...}
  u64* d = rowd(w, i.o[0]);
  int n = i.o[1].vn, eb = i.esz;
  const u64* s[8];
  for (int k = 0; k < n; k++) s[k] = row(w, i.vec[i.o[1].vs + k]);
  if (i.flag) {
    LANES(u64 x = s[0][l]; u64 y = s[1][l]; if (n == 4) {
      x = (u32)s[0][l] | s[1][l] << 32;
      y = (u32)s[2][l] | s[3][l] << 32;
    } d[l] = x;
          d[l + 32] = y;);
    return;
  }
  LANES(u64 v = 0; for (int k = 0; k < n; k++) v |= maskw(s[k][l], eb) << (8 * eb * k); d[l] = v;);
}
static void hUnpack(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[1]);
  int n = i.o[0].vn, eb = i.esz;
  u64* s[8];
  for (int k = 0; k < n; k++) s[k] = rowd(w, i.vec[i.o[0].vs + k]);
  if (i.flag) {
    LANES(
        u64 x = a[l]; u64 y = a[l + 32]; if (n == 2) {
          s[0][l] = x;
          s[1][l] = y;
        } else {
          s[0][l] = (u32)x;
          s[1][l] = x >> 32;
          s[2][l] = (u32)y;
          s[3][l] = y >> 32;
        });
    return;
  }
  LANES(u64 v = a[l]; for (int k = 0; k < n; k++) s[k][l] = maskw(v >> (8 * eb * k), eb););
}
static void hLop3(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  u32 lut = (u32)i.imm;
  u32 pr = 0;
  u32 q = i.flag ? predVal(w, i.o[5], mask) : 0;
  LANES(u32 x = (u32)a[l]; u32 y = (u32)b[l]; u32 z = (u32)c[l]; u32 r = 0;
        if (lut & 1) r |= ~x & ~y & ~z; if (lut & 2) r |= ~x & ~y & z;
        if (lut & 4) r |= ~x & y & ~z; if (lut & 8) r |= ~x & y & z; if (lut & 16) r |= x & ~y & ~z;
        if (lut & 32) r |= x & ~y & z; if (lut & 64) r |= x & y & ~z; if (lut & 128) r |= x & y & z;
        d[l] = r; if (r) pr |= 1u << l;);
  if (i.flag && i.hasDual && i.dual.kind == O_PRED) {
    u32 v = i.boolop == 1 ? pr & q : pr | q;
    u32& p = w.preds[i.dual.idx];
    p = (p & ~mask) | (v & mask);
  }
}
static void hShf(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  bool left = i.flag, clampm = i.flag2;
  LANES(u32 n = (u32)c[l]; n = clampm ? std::min(n, 32u) : n & 31;
        u64 v = ((u64)(u32)b[l] << 32) | (u32)a[l]; d[l] = left      ? (u32)((v << n) >> 32)
                                                           : n == 32 ? (u32)b[l]
                                                                     : (u32)(v >> n);
        if (left && n == 32) d[l] = (u32)a[l];);
}
static void hBfe(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  bool sg = tySigned(i.ty);
  int W = tySize(i.ty) * 8, msb = W - 1;
  LANES(u64 v = W == 32 ? (u32)a[l] : a[l]; int pos = b[l] & 0xff; int len = c[l] & 0xff; u64 sb;
        if (!sg || len == 0) sb = 0; else sb = (v >> std::min(pos + len - 1, msb)) & 1; u64 r = 0;
        for (int k = 0; k < W; k++) {
          u64 bit = (k < len && pos + k <= msb) ? (v >> (pos + k)) & 1 : sb;
          r |= bit << k;
        } d[l] = r;);
}
static void hBfi(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]), *e = row(w, i.o[4]);
  int W = tySize(i.ty) * 8;
  LANES(u64 v = maskw(b[l], W / 8); int pos = c[l] & 0xff; int len = e[l] & 0xff;
        for (int k = 0; k < len && pos + k < W; k++) v =
            (v & ~(1ull << (pos + k))) | (((a[l] >> k) & 1) << (pos + k));
        d[l] = v;);
}
static void hBits(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  int W = tySize(i.ty) * 8;
  LANES(u64 v = maskw(a[l], W / 8); u64 r = 0; switch (i.mode) {
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
      if (tySigned(i.ty) && ((v >> (W - 1)) & 1)) v = maskw(~v, W / 8);
      r = v ? 63 - __builtin_clzll(v) : 0xffffffffu;
      if (v && i.flag) r = (W - 1) - r;
      break;
    }
  } d[l] = maskw(r, i.mode == 2 ? W / 8 : 4););
}
static void hPrmt(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  LANES(
      u64 v = (u32)a[l] | (b[l] << 32); u32 s = (u32)c[l]; u32 r = 0; if (i.mode) {
        static const u16 f4e[4] = {0x3210, 0x4321, 0x5432, 0x6543},
                         b4e[4] = {0x5670, 0x6701, 0x7012, 0x0123},
                         rc8[4] = {0x0000, 0x1111, 0x2222, 0x3333},
                         ecl[4] = {0x3210, 0x3211, 0x3222, 0x3333},
                         ecr[4] = {0x0000, 0x1110, 0x2210, 0x3210},
                         rc16[4] = {0x1010, 0x3232, 0x1010, 0x3232};
        const u16* tt[] = {f4e, f4e, b4e, rc8, ecl, ecr, rc16};
        s = tt[i.mode][s & 3];
      } for (int k = 0; k < 4; k++) {
        u32 n = (s >> (4 * k)) & 15;
        u32 by = (v >> (8 * (n & 7))) & 0xff;
        if (n & 8) by = by & 0x80 ? 0xff : 0;
        r |= by << (8 * k);
      } d[l] = r;);
}
static void hSad(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  int sz = tySize(i.ty);
  bool sg = tySigned(i.ty);
  LANES(
      u64 x = a[l]; u64 y = b[l]; bool lt; if (sg) {
        s64 sx = sz == 2 ? (s16)x : sz == 4 ? (s32)x : (s64)x;
        s64 sy = sz == 2 ? (s16)y : sz == 4 ? (s32)y : (s64)y;
        lt = sx < sy;
        x = sx;
        y = sy;
      } else {
        x = maskw(x, sz);
        y = maskw(y, sz);
        lt = x < y;
      } d[l] = maskw(c[l] + (lt ? y - x : x - y), sz););
}
static void hFns(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  LANES(u32 m = (u32)a[l]; u32 base = (u32)b[l]; s32 off = (s32)c[l]; u32 r = 0xffffffffu;
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
        } d[l] = r;);
}
static void hDp(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  bool sa = i.ty == S32, sb = i.ty2 == S32;
  LANES(u32 r = (u32)c[l]; int n = i.mode ? 2 : 4; for (int k = 0; k < n; k++) {
    s32 x;
    int bk;
    if (i.mode) {
      x = sa ? (s32)(s16)(a[l] >> (16 * k)) : (s32)(u16)(a[l] >> (16 * k));
      bk = k + (i.flag ? 2 : 0);
    } else {
      x = sa ? (s32)(s8)(a[l] >> (8 * k)) : (s32)(u8)(a[l] >> (8 * k));
      bk = k;
    }
    s32 y = sb ? (s32)(s8)(b[l] >> (8 * bk)) : (s32)(u8)(b[l] >> (8 * bk));
    r += (u32)(x * y);
  } d[l] = r;);
}
static void hBmsk(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  LANES(
      u32 x = (u32)a[l]; u32 y = (u32)b[l]; if (i.flag) {
        x = std::min(x, 32u);
        y = std::min(y, 32u);
      } else {
        x &= 31;
        y &= 31;
      } u64 m = ((1ull << y) - 1) << x;
      d[l] = (u32)m;);
}
static void hSzext(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  LANES(u32 n = (u32)b[l]; n = i.flag ? std::min(n, 32u) : n & 31; u32 v = (u32)a[l];
        if (n == 0) v = 0; else if (n < 32) {
          v &= (1u << n) - 1;
          if (i.ty == S32 && (v >> (n - 1)) & 1) v |= ~((1u << n) - 1);
        } d[l] = v;);
}
template <bool S, int OP>
static void hI16x2(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  LANES(u32 r = 0; for (int k = 0; k < 2; k++) {
    s32 x = S ? (s32)(s16)(a[l] >> (16 * k)) : (s32)(u16)(a[l] >> (16 * k));
    s32 y = S ? (s32)(s16)(b[l] >> (16 * k)) : (s32)(u16)(b[l] >> (16 * k));
    s32 v = OP == 0 ? x + y : OP == 1 ? std::min(x, y) : std::max(x, y);
    if (i.relu && v < 0) v = 0;
    r |= (u32)(u16)v << (16 * k);
  } d[l] = r;);
}
// ---------------------------------------------------------------- convert
static u64 f2i(double x, Ty dt, int rnd, Ty st) {
  int bits = tySize(dt) * 8;
  bool sg = tySigned(dt);
  if (x != x) return (st == F64 || bits == 64) ? maskw(1ull << (bits - 1), bits / 8) : 0;
  switch (rnd) {
    case R_RZI:
    case RZ:
      x = std::trunc(x);
      break;
    case R_RMI:
    case RM:
      x = std::floor(x);
      break;
    case R_RPI:
    case RP:
      x = std::ceil(x);
      break;
    default:
      x = std::nearbyint(x);
  }
  if (sg) {
    double lo = -std::ldexp(1.0, bits - 1), hi = std::ldexp(1.0, bits - 1);
    if (x < lo) return maskw((u64)1 << (bits - 1), 8) | (bits < 64 ? ~0ull << (bits - 1) : 0);
    if (x >= hi) return (1ull << (bits - 1)) - 1;
    return (u64)(s64)x;
  }
  if (x <= 0) return 0;
  if (x >= std::ldexp(1.0, bits)) return bits == 64 ? ~0ull : (1ull << bits) - 1;
  return (u64)x;
}
static inline u64 extTo(u64 v, Ty t, int w) {
  switch (t) {
    case S8:
      v = (u64)(s64)(s8)v;
      break;
    case S16:
      v = (u64)(s64)(s16)v;
      break;
    case S32:
      v = (u64)(s64)(s32)v;
      break;
    default:
      v = maskw(v, tySize(t));
  }
  return maskw(v, w);
}
static u64 cvtOne(const Inst& i, u64 a) {
  Ty d = i.ty, s = i.ty2;
  bool df = tyFloat(d), sf = tyFloat(s);
  if (!df && !sf) {
    u64 v = extTo(a, s, 8);
    if (i.sat) {
      int bits = tySize(d) * 8;
      if (tySigned(s)) {
        s64 x = (s64)v;
        if (tySigned(d)) {
          s64 hi = bits == 64 ? INT64_MAX : (1ll << (bits - 1)) - 1;
          x = x > hi ? hi : x < -hi - 1 ? -hi - 1 : x;
        } else {
          if (x < 0) x = 0;
          if (bits < 64 && (u64)x > (1ull << bits) - 1) x = (s64)((1ull << bits) - 1);
        }
        v = (u64)x;
      } else {
        u64 hi = tySigned(d) ? (1ull << (bits - 1)) - 1 : bits == 64 ? ~0ull : (1ull << bits) - 1;
        if (v > hi) v = hi;
      }
    }
    return extTo(v, d, i.o[0].w);
  }
  if (!df) {
    double x = decF(a, s);
    if (i.ftz && s == F32) x = ftzf((float)x);
    return extTo(f2i(x, d, i.rnd, s), d, i.o[0].w);
  }
  if (!sf) {
    u64 v = extTo(a, s, 8);
    bool sg = tySigned(s);
    u64 r;
    if (d == F32) {
      volatile float f;
      {
        Mx g(i.rnd);
        if (sg)
          f = (float)(s64)v;
        else
          f = (float)v;
      }
      r = bitc<u32>((float)f);
    } else if (d == F64) {
      volatile double f;
      {
        Mx g(i.rnd);
        if (sg)
          f = (double)(s64)v;
        else
          f = (double)v;
      }
      r = bitc<u64>((double)f);
    } else {  // half: a 64-bit integer is rounded to odd in double first
      bool neg = sg && (s64)v < 0;
      u64 m = neg ? 0 - v : v;
      double x = (double)(m >> 11) * 2048.0 + ((m & 2047) ? 1 : 0) * 0.0;
      if (m < (1ull << 53))
        x = (double)m;
      else {
        x = (double)((m >> 12) | ((m & 4095) ? 1 : 0)) * 4096.0;
      }
      r = encF(neg ? -x : x, d, i.rnd, false);
    }
    if (i.sat) {
      double x = decF(r, d);
      x = !(x > 0) ? 0 : x > 1 ? 1 : x;
      r = encF(x, d, RN, false);
    }
    return r;
  }
  double x = decF(a, s);
  if (i.ftz && s == F32) x = ftzf((float)x);
  if (i.rnd >= R_RNI && i.rnd <= R_RPI) {
    switch (i.rnd) {
      case R_RNI:
        x = std::nearbyint(x);
        break;
      case R_RZI:
        x = std::trunc(x);
        break;
      case R_RMI:
        x = std::floor(x);
        break;
      default:
        x = std::ceil(x);
    }
  }
  if (i.sat) x = !(x > 0) ? 0 : x > 1 ? 1 : x;
  if (i.relu && x < 0) x = 0;
  if (i.relu && x == 0) x = 0;
  u64 r;
  if (d == F32 && s != F64)
    r = canon((float)x);
  else if (d == F64)
    r = canond(x);
  else if (d == BF16 && i.rnd == RN && !i.flag)
    r = s == F32 || s == F16 || s == BF16 ? f2bf((float)x) : encF(x, d, RN, false);
  else
    r = encF(x, d, i.rnd >= R_RNI ? (int)RN : (int)i.rnd, i.flag);
  if (d == F32 && i.ftz) r = bitc<u32>(ftzf(bitc<float>((u32)r)));
  return r;
}
static void hCvt(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  if (i.ty == F32 && i.ty2 == F16) {
    LANES(d[l] = canon(h2f((u16)a[l])););
    return;
  }
  if (i.ty == F32 && i.ty2 == BF16) {
    LANES(d[l] = canon(b2f((u16)a[l])););
    return;
  }
  if (i.mode == 1) {
    if (i.ty == U64 && i.ty2 == U32)
      LANES(d[l] = (u32)a[l];);
    else if (i.ty == S64 && i.ty2 == S32)
      LANES(d[l] = (u64)(s64)(s32)a[l];);
    else
      LANES(d[l] = (u32)a[l];);
    return;
  }
  LANES(d[l] = cvtOne(i, a[l]););
}
static void hCvtPack2(Warp& w, const Inst& i,
                      u32 mask) {  // two f32 -> packed, or packed <-> packed
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  const u64* b = i.no > 2 ? row(w, i.o[2]) : a;
  Ty e = i.ty == F16X2 ? F16 : i.ty == BF16X2 ? BF16 : i.ty == E4M3X2 ? E4M3 : E5M2;
  int W = tySize(i.ty) * 4;
  bool sf = i.flag;
  auto fix = [&](double x) {
    if (i.relu && (x < 0 || x == 0)) x = 0;
    return x;
  };
  if (i.ty2 == F32) {
    LANES(
        double x = fix(get<float>(a[l])); double y = fix(get<float>(b[l])); u64 hi; u64 lo;
        if (e == BF16 && i.rnd == RN && !sf) {
          hi = f2bf((float)x);
          lo = f2bf((float)y);
        } else if (e == F16 && i.rnd == RN && !sf) {
          hi = f2h((float)x);
          lo = f2h((float)y);
        } else {
          hi = encF(x, e, i.rnd, sf);
          lo = encF(y, e, i.rnd, sf);
        } d[l] = (hi << W) | lo;);
    return;
  }
  Ty se = i.ty2 == F16X2 ? F16 : i.ty2 == BF16X2 ? BF16 : i.ty2 == E4M3X2 ? E4M3 : E5M2;
  int SW = tySize(i.ty2) * 4;
  u64 sm = (1ull << SW) - 1;
  LANES(u64 v = a[l]; u64 lo = encF(fix(decF(v & sm, se)), e, i.rnd, sf);
        u64 hi = encF(fix(decF((v >> SW) & sm, se)), e, i.rnd, sf); d[l] = (hi << W) | lo;);
}
static void hCvtPackI(Warp& w, const Inst& i,
                      u32 mask) {  // cvt.pack.sat.{u16,s16,u8,s8}.s32: a above b, c above both
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  const u64* c = i.no > 3 ? row(w, i.o[3]) : nullptr;
  int bits = tySize(i.ty) * 8;
  bool sg = tySigned(i.ty);
  auto st = [&](u64 v) -> u32 {
    s64 x = (s32)v, hi = sg ? (1ll << (bits - 1)) - 1 : (1ll << bits) - 1,
        lo = sg ? -(1ll << (bits - 1)) : 0;
    x = x < lo ? lo : x > hi ? hi : x;
    return (u32)x & ((1u << bits) - 1);
  };
  LANES(u32 r = st(a[l]) << bits | st(b[l]); if (c) r |= (u32)c[l] << (2 * bits); d[l] = r;);
}
static void hNop(Warp& w, const Inst&, u32) { (void)w; }
static void hFence(Warp& w, const Inst&, u32) { w.L->fences++; }
static void hZero64(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  LANES(d[l] = 0;);
}

// ---------------------------------------------------------------- decode
static bool has(const PInst& p, const char* m) {
  for (auto& x : p.mods)
    if (x == m) return true;
  return false;
}
bool decodeAlu(Module&, Func*, Inst& i, const PInst& p) {
  const std::string& op = p.op;
  Ty t = i.ty;
  bool fl = tyFloat(t) || t == F32X2;
  auto is = [&](const char* s) { return op == s; };
  if (is("mov")) {
    if (p.ops.size() != 2) return false;
    if (t == PRED) {
      i.mode = 4;
      i.fn = hPredOp;
      return true;
    }
    if (p.ops[1].k == O_SREG && p.ops[1].idx >= SR_CLOCK) {
      i.mode = p.ops[1].idx;
      i.fn = hMovClock;
      return true;
    }
    if (p.ops[1].k == O_VEC) {
      i.esz = tySize(t) / (int)p.ops[1].sub.size();
      i.flag = t == B128;
      i.fn = hPack;
      return true;
    }
    if (p.ops[0].k == O_VEC) {
      i.esz = tySize(t) / (int)p.ops[0].sub.size();
      i.flag = t == B128;
      i.fn = hUnpack;
      return true;
    }
    if (t == B128) {
      i.fn = hMov128;
      return true;
    }
    i.esz = tySize(t);
    i.fn = hMov;
    return true;
  }
  if (is("add") || is("addc") || is("sub") || is("subc")) {
    bool sub = op[0] == 's', carry = op.size() == 4, cc = has(p, "cc");
    if (carry || cc) {
      i.carry = carry;
      i.scc = cc;
      bool w = tySize(t) == 8;
      i.fn = sub ? (w ? (Handler)hCarry<u64, 1> : hCarry<u32, 1>)
                 : (w ? (Handler)hCarry<u64, 0> : hCarry<u32, 0>);
      return true;
    }
    if (t == F32X2) {
      i.fn = sub ? (Handler)hF32x2<FSUB> : hF32x2<FADD>;
      return true;
    }
    if (t == U16X2 || t == S16X2) {
      i.fn = hI16x2<false, 0>;
      return !sub;
    }
    if (fl) {
      i.fn = sub ? pickF<FSUB>(t) : pickF<FADD>(t);
      return true;
    }
    if (i.sat && t == S32) {
      i.fn = sub ? (Handler)hBin<s32, ISubSat> : hBin<s32, IAddSat>;
      return true;
    }
    i.fn = sub ? PICK(t, hBin, ISub) : PICK(t, hBin, IAdd);
    return true;
  }
  if (is("mul") || is("mad") || is("madc")) {
    if (t == F32X2) {
      i.fn = hF32x2<FMUL>;
      return true;
    }
    if (fl) {
      i.fn = is("mul") ? pickF<FMUL>(t) : pickF<FFMA>(t);
      return true;
    }
    bool mad = op[1] == 'a', wide = has(p, "wide"), hi = has(p, "hi");
    if (is("madc") || has(p, "cc")) {
      i.carry = is("madc");
      i.scc = has(p, "cc");
      i.flag2 = tySigned(t);
      bool w = tySize(t) == 8;
      i.fn = hi ? (w ? (Handler)hCarry<u64, 3> : hCarry<u32, 3>)
                : (w ? (Handler)hCarry<u64, 2> : hCarry<u32, 2>);
      return true;
    }
    if (wide) {
      switch (t) {
        case U16:
          i.fn = mad ? (Handler)hWide<u16, u32, true> : hWide<u16, u32, false>;
          break;
        case S16:
          i.fn = mad ? (Handler)hWide<s16, s32, true> : hWide<s16, s32, false>;
          break;
        case U32:
        case B32:
          i.fn = mad ? (Handler)hWide<u32, u64, true> : hWide<u32, u64, false>;
          break;
        case S32:
          i.fn = mad ? (Handler)hWide<s32, s64, true> : hWide<s32, s64, false>;
          break;
        default:
          return false;
      }
      return true;
    }
    if (mad && hi && i.sat) {
      i.fn = hMadHiSat<s32>;
      return true;
    }
    if (mad)
      i.fn = hi ? PICK(t, hMad, IMulHi) : PICK(t, hMad, IMulLo);
    else
      i.fn = hi ? PICK(t, hBin, IMulHi) : PICK(t, hBin, IMulLo);
    return true;
  }
  if (is("mul24") || is("mad24")) {
    bool S = t == S32, H = has(p, "hi"), M = is("mad24");
    i.fn = S ? (H ? (M ? (Handler)h24<1, 1, 1> : h24<1, 1, 0>)
                  : (M ? (Handler)h24<1, 0, 1> : h24<1, 0, 0>))
             : (H ? (M ? (Handler)h24<0, 1, 1> : h24<0, 1, 0>)
                  : (M ? (Handler)h24<0, 0, 1> : h24<0, 0, 0>));
    return true;
  }
  if (is("fma")) {
    i.fn = t == F32X2 ? (Handler)hF32x2<FFMA> : pickF<FFMA>(t);
    return true;
  }
  if (is("div")) {
    i.fn = fl ? pickF<FDIV>(t) : PICK(t, hBin, IDiv);
    if (fl && t != F32 && t != F64) return false;
    return true;
  }
  if (is("rem")) {
    i.fn = PICK(t, hBin, IRem);
    return true;
  }
  if (is("min") || is("max")) {
    bool mn = is("min");
    if (t == U16X2) {
      i.fn = mn ? (Handler)hI16x2<false, 1> : hI16x2<false, 2>;
      return true;
    }
    if (t == S16X2) {
      i.fn = mn ? (Handler)hI16x2<true, 1> : hI16x2<true, 2>;
      return true;
    }
    if (fl) {
      i.fn = mn ? pickF<FMIN>(t) : pickF<FMAX>(t);
      return true;
    }
    if (i.relu) {
      i.fn = mn ? (Handler)hBin<s32, IMinRelu> : hBin<s32, IMaxRelu>;
      return t == S32;
    }
    if (p.ops.size() == 4) {
      i.fn = mn ? PICK(t, hTri, IMin) : PICK(t, hTri, IMax);
      return true;
    }
    i.fn = mn ? PICK(t, hBin, IMin) : PICK(t, hBin, IMax);
    return true;
  }
  if (is("abs") || is("neg")) {
    if (fl) {
      i.flag = is("abs");
      i.fn = hNegF;
      return true;
    }
    i.fn = is("abs") ? PICK(t, hUn, IAbs) : PICK(t, hUn, INeg);
    return true;
  }
  if (is("sad")) {
    i.fn = hSad;
    return true;
  }
  if (is("rcp")) {
    i.fn = t == F64 ? (Handler)hF64<FRCP> : hF32<FRCP>;
    return fl;
  }
  if (is("sqrt")) {
    i.fn = t == F64 ? (Handler)hF64<FSQRT> : hF32<FSQRT>;
    return fl;
  }
  if (is("rsqrt")) {
    i.fn = t == F64 ? (Handler)hF64<FRSQ> : hF32<FRSQ>;
    return fl;
  }
  if (is("ex2")) {
    i.fn = pickF<FEX2>(t);
    return t != F64;
  }
  if (is("lg2")) {
    i.fn = hF32<FLG2>;
    return t == F32;
  }
  if (is("sin")) {
    i.fn = hF32<FSIN>;
    return t == F32;
  }
  if (is("cos")) {
    i.fn = hF32<FCOS>;
    return t == F32;
  }
  if (is("tanh")) {
    i.fn = pickF<FTANH>(t);
    return t != F64;
  }
  if (is("copysign")) {
    i.fn = hCopysign;
    return true;
  }
  if (is("testp")) {
    static const char* n[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    for (int k = 0; k < 6; k++)
      if (has(p, n[k])) i.mode = k;
    i.fn = hTestp;
    return true;
  }
  if (is("and") || is("or") || is("xor")) {
    if (t == PRED) {
      i.mode = op[0] == 'a' ? 0 : op[0] == 'o' ? 1 : 2;
      i.fn = hPredOp;
      return true;
    }
    i.fn = op[0] == 'a'   ? PICK(t, hBin, IAnd)
           : op[0] == 'o' ? PICK(t, hBin, IOr)
                          : PICK(t, hBin, IXor);
    return true;
  }
  if (is("not")) {
    if (t == PRED) {
      i.mode = 3;
      i.fn = hPredOp;
      return true;
    }
    i.fn = PICK(t, hUn, INot);
    return true;
  }
  if (is("cnot")) {
    i.fn = PICK(t, hUn, ICnot);
    return true;
  }
  if (is("shl")) {
    i.fn = PICK(t, hShift, IShl);
    return true;
  }
  if (is("shr")) {
    i.fn = PICK(t, hShift, IShr);
    return true;
  }
  if (is("lop3")) {
    i.flag = p.ops.size() > 5;
    i.boolop = has(p, "and") ? 1 : 2;
    i.imm = (int)p.ops[4].ival;
    i.fn = hLop3;
    return true;
  }
  if (is("shf")) {
    i.flag = has(p, "l");
    i.flag2 = has(p, "clamp");
    i.fn = hShf;
    return true;
  }
  if (is("bfe")) {
    i.fn = hBfe;
    return true;
  }
  if (is("bfi")) {
    i.fn = hBfi;
    return true;
  }
  if (is("clz") || is("popc") || is("brev") || is("bfind")) {
    i.mode = is("clz") ? 0 : is("popc") ? 1 : is("brev") ? 2 : 3;
    i.flag = has(p, "shiftamt");
    i.fn = hBits;
    return true;
  }
  if (is("prmt")) {
    static const char* n[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (int k = 1; k < 7; k++)
      if (has(p, n[k])) i.mode = k;
    i.fn = hPrmt;
    return true;
  }
  if (is("fns")) {
    i.fn = hFns;
    return true;
  }
  if (is("bmsk")) {
    i.flag = has(p, "clamp");
    i.fn = hBmsk;
    return true;
  }
  if (is("szext")) {
    i.flag = has(p, "clamp");
    i.fn = hSzext;
    return true;
  }
  if (is("dp4a") || is("dp2a")) {
    i.mode = is("dp2a");
    i.flag = has(p, "hi");
    std::vector<Ty> ts;
    for (auto& m : p.mods)
      if (tyParse(m)) ts.push_back(tyParse(m));
    i.ty = ts[0];
    i.ty2 = ts[1];
    i.fn = hDp;
    return true;
  }
  if (is("setp") || is("set")) {
    static const char* n[] = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                              "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
    bool f = false;
    for (auto& m : p.mods) {
      for (int k = 0; k < 18; k++)
        if (m == n[k] && !f) {
          i.cmp = k;
          f = true;
        }
      if (m == "and") i.boolop = 1;
      if (m == "or") i.boolop = 2;
      if (m == "xor") i.boolop = 3;
    }
    std::vector<Ty> ts;
    for (auto& m : p.mods)
      if (tyParse(m)) ts.push_back(tyParse(m));
    if (ts.empty() || !f) return false;
    i.ty2 = ts.back();
    i.ty = ts[0];
    i.fn = is("setp") ? hSetp : hSet;
    return true;
  }
  if (is("selp")) {
    i.fn = hSelp;
    return true;
  }
  if (is("slct")) {
    i.ty2 = has(p, "f32") && tyParse(p.mods.back()) == F32 ? F32 : S32;
    for (auto& m : p.mods)
      if (tyParse(m)) {
        i.ty = tyParse(m);
        break;
      }
    i.fn = hSlct;
    return true;
  }
  if (is("cvt") && has(p, "pack")) {
    for (auto& m : p.mods)
      if (tyParse(m)) {
        i.ty = tyParse(m);
        break;
      }
    i.fn = hCvtPackI;
    return i.ty == U8 || i.ty == S8 || i.ty == U16 || i.ty == S16;
  }
  if (is("cvt")) {
    std::vector<Ty> ts;
    for (auto& m : p.mods)
      if (tyParse(m)) ts.push_back(tyParse(m));
    if (ts.size() != 2) return false;
    i.ty = ts[0];
    i.ty2 = ts[1];
    i.flag = has(p, "satfinite");
    bool fr = false;
    for (auto& m : p.mods) {
      if (m == "rna") {
        i.rnd = RNA;
        fr = true;
      }
    }
    (void)fr;
    auto packed = [](Ty x) { return x == F16X2 || x == BF16X2 || x == E4M3X2 || x == E5M2X2; };
    if (packed(i.ty)) {
      if (i.ty == E4M3X2 || i.ty == E5M2X2) i.flag = true;
      if (has(p, "rs")) return false;
      if (!(i.ty2 == F32 ? p.ops.size() == 3 : packed(i.ty2))) return false;
      i.fn = hCvtPack2;
      return true;
    }
    if (packed(i.ty2)) return false;
    auto ok = [](Ty x) {
      return (x >= U8 && x <= S64) || (x >= B8 && x <= B64) || x == F16 || x == BF16 || x == F32 ||
             x == F64 || x == TF32;
    };
    if (!ok(i.ty) || !ok(i.ty2)) return false;
    i.mode =
        !i.sat &&
                ((i.ty == U64 && i.ty2 == U32) || (i.ty == S64 && i.ty2 == S32) ||
                 ((i.ty == U32 || i.ty == S32) && (i.ty2 == U64 || i.ty2 == S64) && i.o[0].w == 4))
            ? 1
            : 0;
    i.fn = hCvt;
    return true;
  }
  if (is("membar") || is("fence")) {
    i.fn = hFence;
    return true;
  }
  if (is("prefetch") || is("prefetchu") || is("applypriority") || is("discard") ||
      is("griddepcontrol") || is("setmaxnreg") || is("pmevent") || is("brkpt")) {
    i.fn = hNop;
    return true;
  }
  if (is("createpolicy")) {
    i.fn = hZero64;
    return true;
  }
  return false;
}
