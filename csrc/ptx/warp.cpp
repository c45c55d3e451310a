// warp.cpp - warp-level exchange, vote, match, redux and matrix instructions.
#include "csrc/ptx/vm.h"
static bool has(const PInst& p, const char* m) {
  for (auto& x : p.mods)
    if (x == m) return true;
  return false;
}

static void hShfl(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]), *c = row(w, i.o[3]);
  u32 pr = 0;
  u64 r[32];
  LANES(
      u32 bv = (u32)b[l] & 31; u32 cv = (u32)c[l]; int seg = (cv >> 8) & 31, cl = cv & 31;
      int maxL = (l & seg) | (cl & ~seg); int minL = l & seg; int j; bool p; switch (i.mode) {
        case 0:
          j = l - (int)bv;
          p = j >= maxL;
          break;
        case 1:
          j = l + (int)bv;
          p = j <= maxL;
          break;
        case 2:
          j = l ^ (int)bv;
          p = j <= maxL;
          break;
        default:
          j = minL | ((int)bv & ~seg);
          p = j <= maxL;
      } if (!p) j = l;
      if (j < 0 || j > 31 || !((mask >> j) & 1)) {
        r[l] = 0x7fc07fc0u;
        w.L->shflUndef++;
      } else r[l] = (u32)a[j];
      if (p) pr |= 1u << l;);
  LANES(d[l] = r[l];);
  if (i.hasDual && i.dual.kind == O_PRED) {
    u32& q = w.preds[i.dual.idx];
    q = (q & ~mask) | pr;
  }
}
static void hVote(Warp& w, const Inst& i, u32 mask) {
  u32 v;
  if (i.o[1].kind == O_PRED)
    v = w.preds[i.o[1].idx];
  else {
    const u64* a = row(w, i.o[1]);
    v = 0;
    LANES(if (a[l]) v |= 1u << l;);
  }
  if (i.o[1].neg) v = ~v;
  v &= mask;
  if (i.mode == 3) {
    u64* d = rowd(w, i.o[0]);
    LANES(d[l] = v;);
    return;
  }
  bool r = i.mode == 0 ? v == mask : i.mode == 1 ? v != 0 : (v == mask || v == 0);
  u32& q = w.preds[i.o[0].idx];
  q = (q & ~mask) | (r ? mask : 0);
}
static void hMatch(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  int sz = i.ty == B64 ? 8 : 4;
  u64 v[32], r[32];
  LANES(v[l] = maskw(a[l], sz););
  if (i.mode == 0) {
    LANES(u32 m = 0;
          for (int k = 0; k < 32; k++) if (((mask >> k) & 1) && v[k] == v[l]) m |= 1u << k;
          r[l] = m;);
    LANES(d[l] = r[l];);
    return;
  }
  bool all = true;
  int f = __builtin_ctz(mask);
  LANES(if (v[l] != v[f]) all = false;);
  LANES(d[l] = all ? mask : 0;);
  if (i.hasDual && i.dual.kind == O_PRED) {
    u32& q = w.preds[i.dual.idx];
    q = (q & ~mask) | (all ? mask : 0);
  }
}
static void hRedux(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  bool first = true;
  u32 r = 0;
  if (i.ty == F32) {
    float acc = 0;
    bool any = false, nn = false;
    LANES(
        float x = bitc<float>((u32)a[l]); if (i.flag) x = std::fabs(x);
        if (x != x) { nn = true; } else if (!any) {
          acc = x;
          any = true;
        } else acc = i.mode == 1 ? std::fmin(acc, x) : std::fmax(acc, x););
    u32 o = (!any || (nn && i.nan)) ? 0x7fffffffu : bitc<u32>(acc);
    LANES(d[l] = o;);
    return;
  }
  LANES(
      u32 x = (u32)a[l]; if (first) {
        r = x;
        first = false;
      } else switch (i.mode) {
        case 0:
          r += x;
          break;
        case 1:
          r = i.ty == S32 ? (u32)std::min((s32)r, (s32)x) : std::min(r, x);
          break;
        case 2:
          r = i.ty == S32 ? (u32)std::max((s32)r, (s32)x) : std::max(r, x);
          break;
        case 3:
          r &= x;
          break;
        case 4:
          r |= x;
          break;
        case 5:
          r ^= x;
          break;
      });
  LANES(d[l] = r;);
}
static void hElect(Warp& w, const Inst& i, u32 mask) {
  int ld = __builtin_ctz(mask);
  if (i.o[0].kind != O_SINK) {
    u64* d = rowd(w, i.o[0]);
    LANES(d[l] = ld;);
  }
  if (i.hasDual && i.dual.kind == O_PRED) {
    u32& q = w.preds[i.dual.idx];
    q = (q & ~mask) | (1u << ld);
  }
}
static void hActive(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  LANES(d[l] = mask;);
}
static void hSyncNop(Warp&, const Inst&, u32) {}
static void hWarpBarrier(Warp& w, const Inst&, u32 mask) {
  if (mask == w.alive) w.warpBarriers++;
}
static void hMovmatrix(Warp& w, const Inst& i, u32) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  u64 r[32];
  for (int l = 0; l < 32; l++) {
    u32 x = 0;
    for (int k = 0; k < 2; k++) {
      int c = l >> 2, rr = (l & 3) * 2 + k;
      x |= (u32)(u16)(a[rr * 4 + (c >> 1)] >> (16 * (c & 1))) << (16 * k);
    }
    r[l] = x;
  }
  for (int l = 0; l < 32; l++) d[l] = r[l];
}

// ---------------------------------------------------------------- mma.sync
static int bitsOf(Ty t) {
  switch (t) {
    case S4:
    case U4:
      return 4;
    case B1:
      return 1;
    case F64:
      return 64;
    case TF32:
    case F32:
      return 32;
    case F16:
    case BF16:
      return 16;
    default:
      return 8;
  }
}
static double elemF(u64 reg, int j, Ty t) {
  switch (t) {
    case F16:
      return h2f((u16)(reg >> (16 * j)));
    case BF16:
      return b2f((u16)(reg >> (16 * j)));
    case TF32:
      return bitc<float>((u32)reg & 0xffffe000u);
    case F64:
      return bitc<double>(reg);
    case E4M3:
    case E5M2:
      return decF((reg >> (8 * j)) & 0xff, t);
    default:
      return 0;
  }
}
static int elemI(u64 reg, int j, Ty t) {
  switch (t) {
    case S8:
      return (s8)(reg >> (8 * j));
    case U8:
      return (u8)(reg >> (8 * j));
    case S4:
      return (int)(s8)((u8)(reg >> (4 * j)) << 4) >> 4;
    case U4:
      return (int)(reg >> (4 * j)) & 15;
    default:
      return 0;
  }
}
typedef double v8d __attribute__((vector_size(64)));
template <bool BF>
static void mmaFast(Warp& w, const Mma& q) {  // m16n8k8 / m16n8k16, 16-bit inputs, f32 accumulators
  alignas(64) double A[16][16];
  alignas(64) double B[16][8];
  alignas(64) double C[16][8];
  int K = q.k;
  auto lo = [](u64 v) -> double {
    return BF ? (double)bitc<float>((u32)v << 16) : (double)h2f((u16)v);
  };
  auto hi = [](u64 v) -> double {
    return BF ? (double)bitc<float>((u32)v & 0xffff0000u) : (double)h2f((u16)(v >> 16));
  };
  for (int r = 0; r < q.na; r++) {
    const u64* s = row(w, q.A[r]);
    for (int l = 0; l < 32; l++) {
      double* p = &A[(l >> 2) + 8 * (r & 1)][(l & 3) * 2 + (r >> 1) * 8];
      p[0] = lo(s[l]);
      p[1] = hi(s[l]);
    }
  }
  for (int r = 0; r < q.nb; r++) {
    const u64* s = row(w, q.B[r]);
    for (int l = 0; l < 32; l++) {
      int k = (l & 3) * 2 + r * 8, n = l >> 2;
      B[k][n] = lo(s[l]);
      B[k + 1][n] = hi(s[l]);
    }
  }
  for (int r = 0; r < 4; r++) {
    const u64* s = row(w, q.C[r]);
    for (int l = 0; l < 32; l++)
      C[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)] = bitc<float>((u32)s[l]);
  }
  for (int r = 0; r < 16; r++) {
    v8d acc;
    memcpy(&acc, C[r], 64);
    for (int k = 0; k < K; k++) {
      v8d b;
      memcpy(&b, B[k], 64);
      acc += b * A[r][k];
    }
    memcpy(C[r], &acc, 64);
  }
  for (int r = 0; r < 4; r++) {
    u64* s = rowd(w, q.D[r]);
    for (int l = 0; l < 32; l++) {
      float z = (float)C[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)];
      s[l] = z != z ? 0x7fffffffu : bitc<u32>(z);
    }
  }
}
static void hMma(Warp& w, const Inst& i, u32) {
  const Mma& q = *i.mma;
  if (q.m == 16 && q.c == F32 && q.d == F32 && q.a == q.b && (q.a == BF16 || q.a == F16)) {
    if (q.a == BF16)
      mmaFast<true>(w, q);
    else
      mmaFast<false>(w, q);
    return;
  }
  int bt = bitsOf(q.a), e = bt >= 32 ? 1 : 32 / bt;
  bool integer = q.c == S32;
  int M = q.m, N = q.n, K = q.k;
  static thread_local double A[16 * 64], B[64 * 8], C[16 * 8];
  static thread_local s64 Ai[16 * 64], Bi[64 * 8], Ci[16 * 8];
  bool wide = M == 16;
  for (int r = 0; r < q.na; r++) {
    const u64* s = row(w, q.A[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      int rw = wide ? g + 8 * (r & 1) : g, cb = t * e + (wide ? (r >> 1) : r) * 4 * e;
      for (int j = 0; j < e; j++)
        if (integer)
          Ai[rw * K + cb + j] = elemI(s[l], j, q.a);
        else
          A[rw * K + cb + j] = elemF(s[l], j, q.a);
    }
  }
  for (int r = 0; r < q.nb; r++) {
    const u64* s = row(w, q.B[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3, kb = t * e + r * 4 * e;
      for (int j = 0; j < e; j++)
        if (integer)
          Bi[(kb + j) * N + g] = elemI(s[l], j, q.b);
        else
          B[(kb + j) * N + g] = elemF(s[l], j, q.b);
    }
  }
  int per = q.c == F16 ? 2 : 1, perD = q.d == F16 ? 2 : 1;
  for (int r = 0; r < q.nc; r++) {
    const u64* s = row(w, q.C[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (int j = 0; j < per; j++) {
        int x = r * per + j, rw = g + 8 * (x >> 1), c = t * 2 + (x & 1);
        if (integer)
          Ci[rw * N + c] = (s32)s[l];
        else
          C[rw * N + c] = q.c == F16   ? h2f((u16)(s[l] >> (16 * j)))
                          : q.c == F64 ? bitc<double>(s[l])
                                       : bitc<float>((u32)s[l]);
      }
    }
  }
  if (integer) {
    for (int r = 0; r < M; r++)
      for (int k = 0; k < K; k++) {
        s64 a = Ai[r * K + k];
        for (int c = 0; c < N; c++) Ci[r * N + c] += a * Bi[k * N + c];
      }
  } else
    for (int r = 0; r < M; r++) {
      double acc[8];
      for (int c = 0; c < 8; c++) acc[c] = C[r * N + c];
      for (int k = 0; k < K; k++) {
        double a = A[r * K + k];
        const double* b = &B[k * N];
        for (int c = 0; c < 8; c++) acc[c] += a * b[c];
      }
      for (int c = 0; c < 8; c++) C[r * N + c] = acc[c];
    }
  for (int r = 0; r < q.nd; r++) {
    u64* s = rowd(w, q.D[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      u64 v = 0;
      for (int j = 0; j < perD; j++) {
        int x = r * perD + j, rw = g + 8 * (x >> 1), c = t * 2 + (x & 1);
        if (integer) {
          s64 z = Ci[rw * N + c];
          if (q.satf) z = z > INT32_MAX ? INT32_MAX : z < INT32_MIN ? INT32_MIN : z;
          v = (u32)z;
        } else {
          double z = C[rw * N + c];
          v |= q.d == F16   ? encF(z, F16, RN, false) << (16 * j)
               : q.d == F64 ? bitc<u64>(z)
                            : (z != z ? 0x7fffffffull : (u64)bitc<u32>((float)z));
        }
      }
      s[l] = v;
    }
  }
}
// ---------------------------------------------------------------- wgmma
static u32 swz(u32 a, int mode) {
  switch (mode) {
    case 1:
      return a ^ ((a >> 3) & 0x70);
    case 2:
      return a ^ ((a >> 3) & 0x30);
    case 3:
      return a ^ ((a >> 3) & 0x10);
    default:
      return a;
  }
}  // descriptor codes: 1=128B 2=64B 3=32B
static u32 descAddr(u64 d, int mn, int k, int esz,
                    bool trans) {  // shared address (24 bits) of element (mn, k)
  u32 start = (u32)(d & 0x3fff) << 4, lbo = (u32)((d >> 16) & 0x3fff) << 4,
      sbo = (u32)((d >> 32) & 0x3fff) << 4;
  int mode = (int)(d >> 62);
  int T = 16 / esz;
  u32 a;
  int span = mode == 0 ? 1 : mode == 1 ? 8 : mode == 2 ? 4 : 2;  // 16-byte units per swizzle row
  if (!trans) {
    u32 kb = (u32)k * esz;
    if (mode == 0)
      a = (mn & 7) * 16 + (mn >> 3) * sbo + (kb >> 4) * lbo + (kb & 15);
    else
      a = (mn & 7) * 16 * span + (mn >> 3) * sbo + kb;
  } else {
    int u = mn / T, b = (mn % T) * esz;
    if (mode == 0)
      a = b + (k & 7) * 16 + u * sbo + (k >> 3) * lbo;
    else
      a = b + (u % span) * 16 + (u / span) * lbo + (k & 7) * 16 * span + (k >> 3) * sbo;
  }
  return swz(start + a, mode);
}
static u64 fnv(u64 h, const u8* p, int n) {
  for (int k = 0; k < n; k++) h = (h ^ p[k]) * 1099511628211ull;
  return h;
}
static void hWgmma(Warp& w, const Inst& i, u32) {
  Mma& q = *i.mma;
  int N = q.n, K = q.k, esz = bitsOf(q.a) / 8, e = 4 / esz;
  int rowBase = (w.id & 3) * 16;
  static thread_local std::vector<double> A, B, C;
  A.assign(16 * K, 0);
  B.resize(K * N);
  C.resize(16 * N);
  auto sv = [&](int k) { return row(w, i.o[k])[0]; };
  int p = 1;
  WgRec rec;
  rec.i = &i;
  rec.hash = 1469598103934665603ull;
  Block* b = w.blk;
  bool tf = q.a == TF32;
  auto lds = [&](u32 a) -> double {
    u32 off = a - (u32)SHB;
    if (a < SHB || (u64)off + esz > b->smemSize)
      w.fail(i, -1,
             "wgmma descriptor reaches outside shared memory (offset " +
                 std::to_string((s64)a - (s64)SHB) + ")");
    rec.offs.push_back(off);
    rec.hash = fnv(rec.hash, b->smem + off, esz);
    w.L->shReq += 0;
    u64 v = 0;
    memcpy(&v, b->smem + off, esz);
    return elemF(v, 0, q.a == TF32 ? TF32 : q.a == F16 ? F16 : q.a);
  };
  (void)tf;
  if (i.o[1].kind == O_VEC) {
    for (int r = 0; r < 4; r++) {
      const u64* s = row(w, i.vec[i.o[1].vs + r]);
      for (int l = 0; l < 32; l++)
        for (int j = 0; j < e; j++)
          A[((l >> 2) + 8 * (r & 1)) * K + (l & 3) * e + (r >> 1) * 4 * e + j] =
              elemF(s[l], j, q.a);
    }
  } else {
    u64 d = sv(1);
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < K; k++)
        A[r * K + k] = lds(descAddr(d, rowBase + r, k, esz, i.flag && q.tA));
  }
  u64 db = sv(2);
  Ty save = q.a;
  q.a = q.b;
  for (int n = 0; n < N; n++)
    for (int k = 0; k < K; k++) B[k * N + n] = lds(descAddr(db, n, k, esz, q.tB));
  q.a = save;
  p = 3;
  bool scaleD = i.o[3].kind == O_PRED ? (w.preds[i.o[3].idx] & 1) ^ i.o[3].neg : sv(3) != 0;
  double sa = (s32)sv(4), sb = (s32)sv(5);
  (void)p;
  const Opnd* D = &i.vec[i.o[0].vs];
  bool h = q.d == F16;
  int nd = i.o[0].vn;
  for (int r = 0; r < nd; r++) {
    u64* s = rowd(w, D[r]);
    if (auto it = w.wgPend.find(s); it != w.wgPend.end()) s = it->second.v;
    for (int l = 0; l < 32; l++)
      for (int j = 0; j < (h ? 2 : 1); j++) {
        int x = h ? r * 2 + j : r;
        int rw = (l >> 2) + 8 * ((x >> 1) & 1), c = (x >> 2) * 8 + (l & 3) * 2 + (x & 1);
        C[rw * N + c] = !scaleD ? 0 : h ? h2f((u16)(s[l] >> (16 * j))) : bitc<float>((u32)s[l]);
      }
  }
  double sc = sa * sb;
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++) {
      double a = A[r * K + k] * sc;
      for (int n = 0; n < N; n++) C[r * N + n] += a * B[k * N + n];
    }
  // the accumulators hold poison until a wait_group covers this group
  for (int r = 0; r < nd; r++) {
    u64* reg = rowd(w, D[r]);
    auto& pe = w.wgPend[reg];
    pe.seq = w.wgSeq;
    u64* s = pe.v;
    for (int l = 0; l < 32; l++) reg[l] = 0x7fc07fc0u;
    for (int l = 0; l < 32; l++) {
      u64 v = 0;
      for (int j = 0; j < (h ? 2 : 1); j++) {
        int x = h ? r * 2 + j : r;
        int rw = (l >> 2) + 8 * ((x >> 1) & 1), c = (x >> 2) * 8 + (l & 3) * 2 + (x & 1);
        double z = C[rw * N + c];
        v |= h ? encF(z, F16, RN, false) << (16 * j)
               : (z != z ? 0x7fffffffull : (u64)bitc<u32>((float)z));
      }
      s[l] = v;
    }
  }
  w.wgOpen.push_back(std::move(rec));
}
static void hWgCommit(Warp& w, const Inst&, u32) {
  w.wgGroups.push_back(std::move(w.wgOpen));
  w.wgOpen.clear();
  w.wgSeq++;
  w.L->progress++;
}
static void hWgWait(Warp& w, const Inst& i, u32) {
  // complete for one warp is complete for all four: their operands must be unchanged now, and may
  // change from here on
  u64 upto = w.wgSeq > (u64)i.imm ? w.wgSeq - i.imm : 0;
  for (auto& q : w.blk->warps)
    if (q->id / 4 == w.id / 4) {
      u64 first = q->wgSeq - q->wgGroups.size();
      for (size_t k = 0; k < q->wgGroups.size() && first + k < upto; k++) {
        for (auto& r : q->wgGroups[k]) {
          u64 h = 1469598103934665603ull;
          int esz = bitsOf(r.i->mma->a) / 8;
          for (u32 o : r.offs) h = fnv(h, w.blk->smem + o, esz);
          if (h != r.hash)
            q->fail(*r.i, -1,
                    "shared-memory operand of this wgmma was modified before it was waited for "
                    "(wait at PTX line " +
                        std::to_string(i.src->line) + ")");
        }
        q->wgGroups[k].clear();
      }
    }
  while ((int)w.wgGroups.size() > i.imm) w.wgGroups.erase(w.wgGroups.begin());
  u64 done = w.wgSeq - w.wgGroups.size();
  for (auto it = w.wgPend.begin(); it != w.wgPend.end();) {
    if (it->second.seq < done) {
      memcpy(it->first, it->second.v, 256);
      it = w.wgPend.erase(it);
    } else
      ++it;
  }
}

// ---------------------------------------------------------------- wmma: the fragment layout is
// opaque, so the VM uses its own
static int wmPer(Ty t) { return t == F16 || t == BF16 ? 2 : t == S8 || t == U8 ? 4 : 1; }
static u64 wmGet(Warp& w, const Opnd* v, int n, Ty t, int e, int total) {
  int per = wmPer(t), P = n * per, dup = 32 * P / total;
  (void)dup;
  int l = e / P, s = e % P;
  u64 x = row(w, v[s / per])[l];
  return per == 1 ? x : (x >> (32 / per * (s % per))) & ((1ull << (32 / per)) - 1);
}
static void wmPut(Warp& w, const Opnd* v, int n, Ty t, int e, int total, u64 x) {
  int per = wmPer(t), P = n * per, dup = std::max(1, 32 * P / total);
  for (int k = 0; k < dup; k++) {
    int l = e / P + k * (total / P), s = e % P;
    u64& r = rowd(w, v[s / per])[l];
    if (per == 1)
      r = x;
    else {
      int b = 32 / per, sh = b * (s % per);
      u64 m = ((1ull << b) - 1) << sh;
      r = (u32)((r & ~m) | (x << sh));
    }
  }
}
static void wmDims(const Mma& q, int part, int& R, int& C) {
  R = part == 1 ? q.k : q.m;
  C = part == 0 ? q.k : q.n;
}
static void hWmmaMem(Warp& w, const Inst& i, u32) {
  const Mma& q = *i.mma;
  bool st = i.flag2;
  int R, C;
  wmDims(q, i.mode, R, C);
  const Opnd& mo = i.o[st ? 0 : 1];
  const Opnd& vo = i.o[st ? 1 : 0];
  const Opnd* v = &i.vec[vo.vs];
  int n = vo.vn, es = q.a == F64 ? 8 : 32 / wmPer(q.a) / 8;
  u64 base = row(w, mo)[0] + mo.off;
  u64 ld = i.no > 2 ? (u32)row(w, i.o[2])[0] : i.flag ? R : C;
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      u8* p = w.resolve(i, 0, base + (i.flag ? c * ld + r : r * ld + c) * es, es, i.sp, st ? 2 : 1);
      u64 x = 0;
      if (st) {
        x = wmGet(w, v, n, q.a, r * C + c, R * C);
        memcpy(p, &x, es);
      } else {
        memcpy(&x, p, es);
        wmPut(w, v, n, q.a, r * C + c, R * C, x);
      }
    }
}
static void hWmma(Warp& w, const Inst& i, u32) {
  const Mma& q = *i.mma;
  const Opnd *D = &i.vec[i.o[0].vs], *A = &i.vec[i.o[1].vs], *B = &i.vec[i.o[2].vs],
             *C = &i.vec[i.o[3].vs];
  std::vector<double> b(q.k * q.n);
  bool in = q.c == S32;
  std::vector<u64> out(q.m * q.n);
  auto val = [&](u64 x, Ty t) -> double {
    return t == S32             ? (double)(s32)x
           : t == F32           ? (double)bitc<float>((u32)x)
           : t == S8 || t == U8 ? (double)elemI(x, 0, t)
                                : elemF(x, 0, t);
  };
  for (int k = 0; k < q.k * q.n; k++) b[k] = val(wmGet(w, B, i.o[2].vn, q.b, k, q.k * q.n), q.b);
  for (int r = 0; r < q.m; r++) {
    std::vector<double> acc(q.n);
    for (int c = 0; c < q.n; c++)
      acc[c] = val(wmGet(w, C, i.o[3].vn, q.c, r * q.n + c, q.m * q.n), q.c);
    for (int k = 0; k < q.k; k++) {
      double a = val(wmGet(w, A, i.o[1].vn, q.a, r * q.k + k, q.m * q.k), q.a);
      for (int c = 0; c < q.n; c++) acc[c] += a * b[k * q.n + c];
    }
    for (int c = 0; c < q.n; c++) {
      double z = acc[c];
      out[r * q.n + c] =
          in ? (u32)(s32)(s64)(q.satf ? std::max(-2147483648.0, std::min(2147483647.0, z)) : z)
          : q.d == F16 ? encF(z, F16, RN, false)
          : q.d == F64 ? bitc<u64>(z)
                       : (z != z ? 0x7fffffffull : (u64)bitc<u32>((float)z));
    }
  }
  for (int e = 0; e < q.m * q.n; e++) wmPut(w, D, i.o[0].vn, q.d, e, q.m * q.n, out[e]);
}
bool decodeWarp(Module& Mo, Func*, Inst& i, const PInst& p) {
  const std::string& op = p.op;
  if (op == "shfl") {
    if (!has(p, "sync")) return false;
    i.mode = has(p, "up") ? 0 : has(p, "down") ? 1 : has(p, "bfly") ? 2 : 3;
    i.ctl = C_WSYNC;
    i.mmop = 4;
    i.fn = hShfl;
    return true;
  }
  if (op == "vote") {
    if (!has(p, "sync")) return false;
    i.mode = has(p, "all") ? 0 : has(p, "any") ? 1 : has(p, "uni") ? 2 : 3;
    i.ctl = C_WSYNC;
    i.mmop = 2;
    i.fn = hVote;
    return true;
  }
  if (op == "match") {
    i.mode = has(p, "all");
    i.ctl = C_WSYNC;
    i.mmop = 2;
    i.fn = hMatch;
    return true;
  }
  if (op == "redux") {
    static const char* n[] = {"add", "min", "max", "and", "or", "xor"};
    for (int k = 0; k < 6; k++)
      if (has(p, n[k])) i.mode = k;
    i.flag = has(p, "abs");
    i.ctl = C_WSYNC;
    i.mmop = 2;
    i.fn = hRedux;
    return true;
  }
  if (op == "elect") {
    i.ctl = C_WSYNC;
    i.mmop = 1;
    i.fn = hElect;
    return true;
  }
  if (op == "activemask") {
    i.fn = hActive;
    return true;
  }
  if ((op == "bar" || op == "barrier") && has(p, "warp")) {
    i.ctl = C_WSYNC;
    i.mmop = 0;
    i.fn = hWarpBarrier;
    return true;
  }
  if (op == "movmatrix") {
    i.ctl = C_WSYNC;
    i.aligned = true;
    i.fn = hMovmatrix;
    return true;
  }
  if (op == "wmma") {
    auto m = std::make_unique<Mma>();
    std::vector<Ty> ts;
    bool shape = false;
    for (auto& x : p.mods) {
      int a, b, c;
      if (sscanf(x.c_str(), "m%dn%dk%d", &a, &b, &c) == 3) {
        m->m = a;
        m->n = b;
        m->k = c;
        shape = true;
      } else if (tyParse(x))
        ts.push_back(tyParse(x));
      if (x == "satfinite") m->satf = true;
      if (x == "global") i.sp = SP_GLOBAL;
      if (x.rfind("shared", 0) == 0) i.sp = SP_SHARED;
    }
    for (Ty t : ts)
      if (t == S4 || t == U4 || t == B1) return false;
    if (!shape || ts.empty()) return false;
    i.ctl = C_WSYNC;
    i.aligned = true;
    if (p.mods[0] == "mma") {
      if (ts.size() == 2) {
        m->d = ts[0];
        m->c = ts[1];
        m->a = m->b = F16;
      } else if (ts.size() == 4) {
        m->d = ts[0];
        m->a = ts[1];
        m->b = ts[2];
        m->c = ts[3];
      } else
        return false;
      for (int k = 0; k < 4; k++)
        if (i.o[k].kind != O_VEC) return false;
      i.fn = hWmma;
    } else {
      i.flag2 = p.mods[0] == "store";
      i.mode = i.flag2 ? 2 : p.mods[1] == "a" ? 0 : p.mods[1] == "b" ? 1 : 2;
      i.flag = has(p, "col");
      m->a = ts[0];
      if (i.o[i.flag2 ? 1 : 0].kind != O_VEC) return false;
      i.fn = hWmmaMem;
    }
    i.mma = m.get();
    Mo.mmas.push_back(std::move(m));
    return true;
  }
  if (op == "mma" || (op == "wgmma" && has(p, "mma_async"))) {
    if (has(p, "sp") || p.full.find("::ordered") != std::string::npos || has(p, "kind::mxf8f6f4"))
      return false;
    bool wg = op == "wgmma";
    auto m = std::make_unique<Mma>();
    bool shape = false;
    std::vector<Ty> ts;
    for (auto& x : p.mods) {
      int a, b, c;
      if (sscanf(x.c_str(), "m%dn%dk%d", &a, &b, &c) == 3) {
        m->m = a;
        m->n = b;
        m->k = c;
        shape = true;
      } else if (tyParse(x))
        ts.push_back(tyParse(x));
      if (x == "satfinite") m->satf = true;
    }
    if (!shape) return false;
    if (wg) {
      if (ts.size() == 3) {
        m->d = m->c = ts[0];
        m->a = ts[1];
        m->b = ts[2];
      } else
        return false;
      if (m->d != F32 && m->d != F16) return false;
      bool rs = i.o[1].kind == O_VEC;
      if (i.no < 6 || m->m != 64) return false;
      auto cv = [&](int k) { return (int)p.ops[k].ival; };
      m->tA = 0;
      if (rs) {
        if (p.ops.size() > 6) m->tB = cv(6);
      } else if (p.ops.size() > 7) {
        m->tA = cv(6);
        m->tB = cv(7);
      } else if (p.ops.size() > 6)
        return false;
      i.flag = true;
      i.mma = m.get();
      Mo.mmas.push_back(std::move(m));
      i.ctl = C_WSYNC;
      i.aligned = true;
      i.fn = hWgmma;
      return true;
    }
    if (ts.size() == 3) {
      m->d = m->c = ts[0];
      m->a = ts[1];
      m->b = ts[2];
    } else if (ts.size() == 4) {
      m->d = ts[0];
      m->a = ts[1];
      m->b = ts[2];
      m->c = ts[3];
    } else
      return false;
    auto take = [&](int k, Opnd* out, int& n) {
      const Opnd& o = i.o[k];
      if (o.kind == O_VEC) {
        n = o.vn;
        for (int z = 0; z < n && z < 16; z++) out[z] = i.vec[o.vs + z];
      } else {
        n = 1;
        out[0] = o;
      }
    };
    take(0, m->D, m->nd);
    take(1, m->A, m->na);
    take(2, m->B, m->nb);
    take(3, m->C, m->nc);
    if (!((m->m == 16 && m->n == 8) ||
          (m->m == 8 && m->n == 8 &&
           (m->a == F64 || m->a == S8 || m->a == U8 || m->a == S4 || m->a == U4))))
      return false;
    if (m->a == B1 || m->k > 64) return false;
    int bt = bitsOf(m->a), e = bt >= 32 ? 1 : 32 / bt;
    if (m->na * 32 * e != m->m * m->k || m->nb * 32 * e != m->n * m->k) return false;
    i.mma = m.get();
    Mo.mmas.push_back(std::move(m));
    i.ctl = C_WSYNC;
    i.aligned = true;
    i.fn = hMma;
    return true;
  }
  if (op == "wgmma") {
    i.ctl = C_WSYNC;
    i.aligned = true;
    if (has(p, "fence")) {
      i.fn = hSyncNop;
      return true;
    }
    if (has(p, "commit_group")) {
      i.fn = hWgCommit;
      return true;
    }
    if (has(p, "wait_group")) {
      i.ctl = C_WGWAIT;
      i.imm = (int)p.ops[0].ival;
      i.fn = hWgWait;
      return true;
    }
    return false;
  }
  return false;
}
