// warp.cpp - warp-level exchange, vote, match, redux and matrix instructions.
#include "csrc/ptx/instructions/instructions.h"

namespace mergeme::ptx {

static void hShfl(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]), *c = row(w, i.operands[3]);
  uint32_t pr = 0;
  uint64_t r[32];
  for_each_lane(mask, [&](int l) {
    uint32_t bv = (uint32_t)b[l] & 31;
    uint32_t cv = (uint32_t)c[l];
    int seg = (cv >> 8) & 31, cl = cv & 31;
    int maxL = (l & seg) | (cl & ~seg);
    int minL = l & seg;
    int j;
    bool p;
    switch (i.variant) {
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
    }
    if (!p) j = l;
    if (j < 0 || j > 31 || !((mask >> j) & 1)) {
      r[l] = 0x7fc07fc0u;
      w.launch->statistics.shfl_undefined_reads++;
    } else
      r[l] = (uint32_t)a[j];
    if (p) pr |= 1u << l;
  });
  for_each_lane(mask, [&](int l) { d[l] = r[l]; });
  if (i.has_second_output && i.second_output.kind == OperandKind::kPredicate) {
    uint32_t& q = w.predicates[i.second_output.index];
    q = (q & ~mask) | pr;
  }
}
static void hVote(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t v;
  if (i.operands[1].kind == OperandKind::kPredicate)
    v = w.predicates[i.operands[1].index];
  else {
    const uint64_t* a = row(w, i.operands[1]);
    v = 0;
    for_each_lane(mask, [&](int l) {
      if (a[l]) v |= 1u << l;
    });
  }
  if (i.operands[1].negated) v = ~v;
  v &= mask;
  if (i.variant == 3) {
    uint64_t* d = result_row(w, i.operands[0]);
    for_each_lane(mask, [&](int l) { d[l] = v; });
    return;
  }
  bool r = i.variant == 0 ? v == mask : i.variant == 1 ? v != 0 : (v == mask || v == 0);
  uint32_t& q = w.predicates[i.operands[0].index];
  q = (q & ~mask) | (r ? mask : 0);
}
static void hMatch(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  int sz = i.type == Type::kB64 ? 8 : 4;
  uint64_t v[32], r[32];
  for_each_lane(mask, [&](int l) { v[l] = low_bytes(a[l], sz); });
  if (i.variant == 0) {
    for_each_lane(mask, [&](int l) {
      uint32_t m = 0;
      for (int k = 0; k < 32; k++)
        if (((mask >> k) & 1) && v[k] == v[l]) m |= 1u << k;
      r[l] = m;
    });
    for_each_lane(mask, [&](int l) { d[l] = r[l]; });
    return;
  }
  bool all = true;
  int f = __builtin_ctz(mask);
  for_each_lane(mask, [&](int l) {
    if (v[l] != v[f]) all = false;
  });
  for_each_lane(mask, [&](int l) { d[l] = all ? mask : 0; });
  if (i.has_second_output && i.second_output.kind == OperandKind::kPredicate) {
    uint32_t& q = w.predicates[i.second_output.index];
    q = (q & ~mask) | (all ? mask : 0);
  }
}
static void hRedux(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  bool first = true;
  uint32_t r = 0;
  if (i.type == Type::kF32) {
    float acc = 0;
    bool any = false, nn = false;
    for_each_lane(mask, [&](int l) {
      float x = std::bit_cast<float>((uint32_t)a[l]);
      if (i.flag) x = std::fabs(x);
      if (x != x) {
        nn = true;
      } else if (!any) {
        acc = x;
        any = true;
      } else
        acc = i.variant == 1 ? std::fmin(acc, x) : std::fmax(acc, x);
    });
    uint32_t o = (!any || (nn && i.nan)) ? 0x7fffffffu : std::bit_cast<uint32_t>(acc);
    for_each_lane(mask, [&](int l) { d[l] = o; });
    return;
  }
  for_each_lane(mask, [&](int l) {
    uint32_t x = (uint32_t)a[l];
    if (first) {
      r = x;
      first = false;
    } else
      switch (i.variant) {
        case 0:
          r += x;
          break;
        case 1:
          r = i.type == Type::kS32 ? (uint32_t)std::min((int32_t)r, (int32_t)x) : std::min(r, x);
          break;
        case 2:
          r = i.type == Type::kS32 ? (uint32_t)std::max((int32_t)r, (int32_t)x) : std::max(r, x);
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
      }
  });
  for_each_lane(mask, [&](int l) { d[l] = r; });
}
static void hElect(Warp& w, const Instruction& i, uint32_t mask) {
  int ld = __builtin_ctz(mask);
  if (i.operands[0].kind != OperandKind::kSink) {
    uint64_t* d = result_row(w, i.operands[0]);
    for_each_lane(mask, [&](int l) { d[l] = ld; });
  }
  if (i.has_second_output && i.second_output.kind == OperandKind::kPredicate) {
    uint32_t& q = w.predicates[i.second_output.index];
    q = (q & ~mask) | (1u << ld);
  }
}
static void hActive(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  for_each_lane(mask, [&](int l) { d[l] = mask; });
}
static void hSyncNop(Warp&, const Instruction&, uint32_t) {}
static void hMovmatrix(Warp& w, const Instruction& i, uint32_t) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  uint64_t r[32];
  for (int l = 0; l < 32; l++) {
    uint32_t x = 0;
    for (int k = 0; k < 2; k++) {
      int c = l >> 2, rr = (l & 3) * 2 + k;
      x |= (uint32_t)(uint16_t)(a[rr * 4 + (c >> 1)] >> (16 * (c & 1))) << (16 * k);
    }
    r[l] = x;
  }
  for (int l = 0; l < 32; l++) d[l] = r[l];
}

// ---------------------------------------------------------------- mma.sync
static int bitsOf(Type t) {
  switch (t) {
    case Type::kS4:
    case Type::kU4:
      return 4;
    case Type::kB1:
      return 1;
    case Type::kF64:
      return 64;
    case Type::kTF32:
    case Type::kF32:
      return 32;
    case Type::kF16:
    case Type::kBF16:
      return 16;
    default:
      return 8;
  }
}
static double elemF(uint64_t reg, int j, Type t) {
  switch (t) {
    case Type::kF16:
      return half_to_float((uint16_t)(reg >> (16 * j)));
    case Type::kBF16:
      return bfloat16_to_float((uint16_t)(reg >> (16 * j)));
    case Type::kTF32:
      return std::bit_cast<float>((uint32_t)reg & 0xffffe000u);
    case Type::kF64:
      return std::bit_cast<double>(reg);
    case Type::kE4M3:
    case Type::kE5M2:
      return decode_float((reg >> (8 * j)) & 0xff, t);
    default:
      return 0;
  }
}
static int elemI(uint64_t reg, int j, Type t) {
  switch (t) {
    case Type::kS8:
      return (int8_t)(reg >> (8 * j));
    case Type::kU8:
      return (uint8_t)(reg >> (8 * j));
    case Type::kS4:
      return (int)(int8_t)((uint8_t)(reg >> (4 * j)) << 4) >> 4;
    case Type::kU4:
      return (int)(reg >> (4 * j)) & 15;
    default:
      return 0;
  }
}
typedef double v8d __attribute__((vector_size(64)));
template <bool BF>
static void mmaFast(
    Warp& w, const MatrixMultiply& q) {  // m16n8k8 / m16n8k16, 16-bit inputs, f32 accumulators
  alignas(64) double A[16][16];
  alignas(64) double B[16][8];
  alignas(64) double C[16][8];
  int K = q.k;
  auto lo = [](uint64_t v) -> double {
    return BF ? (double)std::bit_cast<float>((uint32_t)v << 16)
              : (double)half_to_float((uint16_t)v);
  };
  auto hi = [](uint64_t v) -> double {
    return BF ? (double)std::bit_cast<float>((uint32_t)v & 0xffff0000u)
              : (double)half_to_float((uint16_t)(v >> 16));
  };
  for (int r = 0; r < q.num_a; r++) {
    const uint64_t* s = row(w, q.a[r]);
    for (int l = 0; l < 32; l++) {
      double* p = &A[(l >> 2) + 8 * (r & 1)][(l & 3) * 2 + (r >> 1) * 8];
      p[0] = lo(s[l]);
      p[1] = hi(s[l]);
    }
  }
  for (int r = 0; r < q.num_b; r++) {
    const uint64_t* s = row(w, q.b[r]);
    for (int l = 0; l < 32; l++) {
      int k = (l & 3) * 2 + r * 8, n = l >> 2;
      B[k][n] = lo(s[l]);
      B[k + 1][n] = hi(s[l]);
    }
  }
  for (int r = 0; r < 4; r++) {
    const uint64_t* s = row(w, q.c[r]);
    for (int l = 0; l < 32; l++)
      C[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)] = std::bit_cast<float>((uint32_t)s[l]);
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
    uint64_t* s = result_row(w, q.d[r]);
    for (int l = 0; l < 32; l++) {
      float z = (float)C[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)];
      s[l] = z != z ? 0x7fffffffu : std::bit_cast<uint32_t>(z);
    }
  }
}
static void hMma(Warp& w, const Instruction& i, uint32_t) {
  const MatrixMultiply& q = *i.matrix;
  if (q.m == 16 && q.c_type == Type::kF32 && q.d_type == Type::kF32 && q.a_type == q.b_type &&
      (q.a_type == Type::kBF16 || q.a_type == Type::kF16)) {
    if (q.a_type == Type::kBF16)
      mmaFast<true>(w, q);
    else
      mmaFast<false>(w, q);
    return;
  }
  int bt = bitsOf(q.a_type), e = bt >= 32 ? 1 : 32 / bt;
  bool integer = q.c_type == Type::kS32;
  int M = q.m, N = q.n, K = q.k;
  static thread_local double A[16 * 64], B[64 * 8], C[16 * 8];
  static thread_local int64_t Ai[16 * 64], Bi[64 * 8], Ci[16 * 8];
  bool wide = M == 16;
  for (int r = 0; r < q.num_a; r++) {
    const uint64_t* s = row(w, q.a[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      int rw = wide ? g + 8 * (r & 1) : g, cb = t * e + (wide ? (r >> 1) : r) * 4 * e;
      for (int j = 0; j < e; j++)
        if (integer)
          Ai[rw * K + cb + j] = elemI(s[l], j, q.a_type);
        else
          A[rw * K + cb + j] = elemF(s[l], j, q.a_type);
    }
  }
  for (int r = 0; r < q.num_b; r++) {
    const uint64_t* s = row(w, q.b[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3, kb = t * e + r * 4 * e;
      for (int j = 0; j < e; j++)
        if (integer)
          Bi[(kb + j) * N + g] = elemI(s[l], j, q.b_type);
        else
          B[(kb + j) * N + g] = elemF(s[l], j, q.b_type);
    }
  }
  int per = q.c_type == Type::kF16 ? 2 : 1, perD = q.d_type == Type::kF16 ? 2 : 1;
  for (int r = 0; r < q.num_c; r++) {
    const uint64_t* s = row(w, q.c[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (int j = 0; j < per; j++) {
        int x = r * per + j, rw = g + 8 * (x >> 1), c = t * 2 + (x & 1);
        if (integer)
          Ci[rw * N + c] = (int32_t)s[l];
        else
          C[rw * N + c] = q.c_type == Type::kF16   ? half_to_float((uint16_t)(s[l] >> (16 * j)))
                          : q.c_type == Type::kF64 ? std::bit_cast<double>(s[l])
                                                   : std::bit_cast<float>((uint32_t)s[l]);
      }
    }
  }
  if (integer) {
    for (int r = 0; r < M; r++)
      for (int k = 0; k < K; k++) {
        int64_t a = Ai[r * K + k];
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
  for (int r = 0; r < q.num_d; r++) {
    uint64_t* s = result_row(w, q.d[r]);
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      uint64_t v = 0;
      for (int j = 0; j < perD; j++) {
        int x = r * perD + j, rw = g + 8 * (x >> 1), c = t * 2 + (x & 1);
        if (integer) {
          int64_t z = Ci[rw * N + c];
          if (q.satfinite) z = z > INT32_MAX ? INT32_MAX : z < INT32_MIN ? INT32_MIN : z;
          v = (uint32_t)z;
        } else {
          double z = C[rw * N + c];
          v |= q.d_type == Type::kF16
                   ? encode_float(z, Type::kF16, Rounding::kRn, false) << (16 * j)
               : q.d_type == Type::kF64
                   ? std::bit_cast<uint64_t>(z)
                   : (z != z ? 0x7fffffffull : (uint64_t)std::bit_cast<uint32_t>((float)z));
        }
      }
      s[l] = v;
    }
  }
}
// ---------------------------------------------------------------- wgmma
static uint32_t swz(uint32_t a, int mode) {
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
static uint32_t descAddr(uint64_t d, int mn, int k, int esz,
                         bool trans) {  // shared address (24 bits) of element (mn, k)
  uint32_t start = (uint32_t)(d & 0x3fff) << 4, lbo = (uint32_t)((d >> 16) & 0x3fff) << 4,
           sbo = (uint32_t)((d >> 32) & 0x3fff) << 4;
  int mode = (int)(d >> 62);
  int T = 16 / esz;
  uint32_t a;
  int span = mode == 0 ? 1 : mode == 1 ? 8 : mode == 2 ? 4 : 2;  // 16-byte units per swizzle row
  if (!trans) {
    uint32_t kb = (uint32_t)k * esz;
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
static uint64_t fnv(uint64_t h, const uint8_t* p, int n) {
  for (int k = 0; k < n; k++) h = (h ^ p[k]) * 1099511628211ull;
  return h;
}
static void hWgmma(Warp& w, const Instruction& i, uint32_t) {
  MatrixMultiply& q = *i.matrix;
  int N = q.n, K = q.k, esz = bitsOf(q.a_type) / 8, e = 4 / esz;
  int rowBase = (w.id & 3) * 16;
  static thread_local std::vector<double> A, B, C;
  A.assign(16 * K, 0);
  B.resize(K * N);
  C.resize(16 * N);
  auto sv = [&](int k) { return row(w, i.operands[k])[0]; };
  int p = 1;
  WgmmaRecord rec;
  rec.instruction = &i;
  rec.digest = 1469598103934665603ull;
  Block* b = w.block;
  bool tf = q.a_type == Type::kTF32;
  auto lds = [&](uint32_t a) -> double {
    uint32_t off = a - (uint32_t)kSharedBase;
    if (a < kSharedBase || (uint64_t)off + esz > b->shared_bytes)
      w.fail(i, -1,
             "wgmma descriptor reaches outside shared memory (offset " +
                 std::to_string((int64_t)a - (int64_t)kSharedBase) + ")");
    rec.offsets.push_back(off);
    rec.digest = fnv(rec.digest, b->shared + off, esz);
    uint64_t v = 0;
    memcpy(&v, b->shared + off, esz);
    return elemF(v, 0,
                 q.a_type == Type::kTF32  ? Type::kTF32
                 : q.a_type == Type::kF16 ? Type::kF16
                                          : q.a_type);
  };
  (void)tf;
  if (i.operands[1].kind == OperandKind::kVector) {
    for (int r = 0; r < 4; r++) {
      const uint64_t* s = row(w, i.elements[i.operands[1].first + r]);
      for (int l = 0; l < 32; l++)
        for (int j = 0; j < e; j++)
          A[((l >> 2) + 8 * (r & 1)) * K + (l & 3) * e + (r >> 1) * 4 * e + j] =
              elemF(s[l], j, q.a_type);
    }
  } else {
    uint64_t d = sv(1);
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < K; k++)
        A[r * K + k] = lds(descAddr(d, rowBase + r, k, esz, i.flag && q.transposed_a));
  }
  uint64_t db = sv(2);
  Type save = q.a_type;
  q.a_type = q.b_type;
  for (int n = 0; n < N; n++)
    for (int k = 0; k < K; k++) B[k * N + n] = lds(descAddr(db, n, k, esz, q.transposed_b));
  q.a_type = save;
  p = 3;
  bool scaleD = i.operands[3].kind == OperandKind::kPredicate
                    ? (w.predicates[i.operands[3].index] & 1) ^ i.operands[3].negated
                    : sv(3) != 0;
  double sa = (int32_t)sv(4), sb = (int32_t)sv(5);
  (void)p;
  const Operand* D = &i.elements[i.operands[0].first];
  bool h = q.d_type == Type::kF16;
  int nd = i.operands[0].count;
  for (int r = 0; r < nd; r++) {
    uint64_t* s = result_row(w, D[r]);
    if (auto it = w.pending_accumulators.find(s); it != w.pending_accumulators.end())
      s = it->second.values.data();
    for (int l = 0; l < 32; l++)
      for (int j = 0; j < (h ? 2 : 1); j++) {
        int x = h ? r * 2 + j : r;
        int rw = (l >> 2) + 8 * ((x >> 1) & 1), c = (x >> 2) * 8 + (l & 3) * 2 + (x & 1);
        C[rw * N + c] = !scaleD ? 0
                        : h     ? half_to_float((uint16_t)(s[l] >> (16 * j)))
                                : std::bit_cast<float>((uint32_t)s[l]);
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
    uint64_t* reg = result_row(w, D[r]);
    auto& pe = w.pending_accumulators[reg];
    pe.group = w.wgmma_group;
    uint64_t* s = pe.values.data();
    for (int l = 0; l < 32; l++) reg[l] = 0x7fc07fc0u;
    for (int l = 0; l < 32; l++) {
      uint64_t v = 0;
      for (int j = 0; j < (h ? 2 : 1); j++) {
        int x = h ? r * 2 + j : r;
        int rw = (l >> 2) + 8 * ((x >> 1) & 1), c = (x >> 2) * 8 + (l & 3) * 2 + (x & 1);
        double z = C[rw * N + c];
        v |= h ? encode_float(z, Type::kF16, Rounding::kRn, false) << (16 * j)
               : (z != z ? 0x7fffffffull : (uint64_t)std::bit_cast<uint32_t>((float)z));
      }
      s[l] = v;
    }
  }
  w.open_wgmmas.push_back(std::move(rec));
}
static void hWgCommit(Warp& w, const Instruction&, uint32_t) {
  w.wgmma_groups.push_back(std::move(w.open_wgmmas));
  w.open_wgmmas.clear();
  w.wgmma_group++;
  w.launch->progress++;
}
static void hWgWait(Warp& w, const Instruction& i, uint32_t) {
  // complete for one warp is complete for all four: their operands must be unchanged now, and may
  // change from here on
  uint64_t upto = w.wgmma_group > (uint64_t)i.immediate ? w.wgmma_group - i.immediate : 0;
  for (auto& q : w.block->warps)
    if (q->id / 4 == w.id / 4) {
      uint64_t first = q->wgmma_group - q->wgmma_groups.size();
      for (size_t k = 0; k < q->wgmma_groups.size() && first + k < upto; k++) {
        for (auto& r : q->wgmma_groups[k]) {
          uint64_t h = 1469598103934665603ull;
          int esz = bitsOf(r.instruction->matrix->a_type) / 8;
          for (uint32_t o : r.offsets) h = fnv(h, w.block->shared + o, esz);
          if (h != r.digest)
            q->fail(*r.instruction, -1,
                    "shared-memory operand of this wgmma was modified before it was waited for "
                    "(wait at PTX line " +
                        std::to_string(i.source->line) + ")");
        }
        q->wgmma_groups[k].clear();
      }
    }
  while ((int)w.wgmma_groups.size() > i.immediate) w.wgmma_groups.erase(w.wgmma_groups.begin());
  uint64_t done = w.wgmma_group - w.wgmma_groups.size();
  for (auto it = w.pending_accumulators.begin(); it != w.pending_accumulators.end();) {
    if (it->second.group < done) {
      memcpy(it->first, it->second.values.data(), 256);
      it = w.pending_accumulators.erase(it);
    } else
      ++it;
  }
}

// ---------------------------------------------------------------- wmma: the fragment layout is
// opaque, so the VM uses its own
static int wmPer(Type t) {
  return t == Type::kF16 || t == Type::kBF16 ? 2 : t == Type::kS8 || t == Type::kU8 ? 4 : 1;
}
static uint64_t wmGet(Warp& w, const Operand* v, int n, Type t, int e, int total) {
  int per = wmPer(t), P = n * per, dup = 32 * P / total;
  (void)dup;
  int l = e / P, s = e % P;
  uint64_t x = row(w, v[s / per])[l];
  return per == 1 ? x : (x >> (32 / per * (s % per))) & ((1ull << (32 / per)) - 1);
}
static void wmPut(Warp& w, const Operand* v, int n, Type t, int e, int total, uint64_t x) {
  int per = wmPer(t), P = n * per, dup = std::max(1, 32 * P / total);
  for (int k = 0; k < dup; k++) {
    int l = e / P + k * (total / P), s = e % P;
    uint64_t& r = result_row(w, v[s / per])[l];
    if (per == 1)
      r = x;
    else {
      int b = 32 / per, sh = b * (s % per);
      uint64_t m = ((1ull << b) - 1) << sh;
      r = (uint32_t)((r & ~m) | (x << sh));
    }
  }
}
static void wmDims(const MatrixMultiply& q, int part, int& R, int& C) {
  R = part == 1 ? q.k : q.m;
  C = part == 0 ? q.k : q.n;
}
static void hWmmaMem(Warp& w, const Instruction& i, uint32_t) {
  const MatrixMultiply& q = *i.matrix;
  bool st = i.second_flag;
  int R, C;
  wmDims(q, i.variant, R, C);
  const Operand& mo = i.operands[st ? 0 : 1];
  const Operand& vo = i.operands[st ? 1 : 0];
  const Operand* v = &i.elements[vo.first];
  int n = vo.count, es = q.a_type == Type::kF64 ? 8 : 32 / wmPer(q.a_type) / 8;
  uint64_t base = row(w, mo)[0] + mo.offset;
  uint64_t ld = i.num_operands > 2 ? (uint32_t)row(w, i.operands[2])[0] : i.flag ? R : C;
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      uint8_t* p = w.resolve(i, 0, base + (i.flag ? c * ld + r : r * ld + c) * es, es, i.space,
                             st ? Access::kWrite : Access::kRead);
      uint64_t x = 0;
      if (st) {
        x = wmGet(w, v, n, q.a_type, r * C + c, R * C);
        memcpy(p, &x, es);
      } else {
        memcpy(&x, p, es);
        wmPut(w, v, n, q.a_type, r * C + c, R * C, x);
      }
    }
}
static void hWmma(Warp& w, const Instruction& i, uint32_t) {
  const MatrixMultiply& q = *i.matrix;
  const Operand *D = &i.elements[i.operands[0].first], *A = &i.elements[i.operands[1].first],
                *B = &i.elements[i.operands[2].first], *C = &i.elements[i.operands[3].first];
  std::vector<double> b(q.k * q.n);
  bool in = q.c_type == Type::kS32;
  std::vector<uint64_t> out(q.m * q.n);
  auto val = [&](uint64_t x, Type t) -> double {
    return t == Type::kS32                    ? (double)(int32_t)x
           : t == Type::kF32                  ? (double)std::bit_cast<float>((uint32_t)x)
           : t == Type::kS8 || t == Type::kU8 ? (double)elemI(x, 0, t)
                                              : elemF(x, 0, t);
  };
  for (int k = 0; k < q.k * q.n; k++)
    b[k] = val(wmGet(w, B, i.operands[2].count, q.b_type, k, q.k * q.n), q.b_type);
  for (int r = 0; r < q.m; r++) {
    std::vector<double> acc(q.n);
    for (int c = 0; c < q.n; c++)
      acc[c] = val(wmGet(w, C, i.operands[3].count, q.c_type, r * q.n + c, q.m * q.n), q.c_type);
    for (int k = 0; k < q.k; k++) {
      double a = val(wmGet(w, A, i.operands[1].count, q.a_type, r * q.k + k, q.m * q.k), q.a_type);
      for (int c = 0; c < q.n; c++) acc[c] += a * b[k * q.n + c];
    }
    for (int c = 0; c < q.n; c++) {
      double z = acc[c];
      out[r * q.n + c] =
          in ? (uint32_t)(int32_t)(int64_t)(q.satfinite
                                                ? std::max(-2147483648.0, std::min(2147483647.0, z))
                                                : z)
          : q.d_type == Type::kF16 ? encode_float(z, Type::kF16, Rounding::kRn, false)
          : q.d_type == Type::kF64
              ? std::bit_cast<uint64_t>(z)
              : (z != z ? 0x7fffffffull : (uint64_t)std::bit_cast<uint32_t>((float)z));
    }
  }
  for (int e = 0; e < q.m * q.n; e++)
    wmPut(w, D, i.operands[0].count, q.d_type, e, q.m * q.n, out[e]);
}
bool decode_warp(const ParsedInstruction& p, Instruction& i) {
  const std::string& op = p.opcode;
  if (op == "shfl") {
    if (!p.has("sync")) return false;
    i.variant = p.has("up") ? 0 : p.has("down") ? 1 : p.has("bfly") ? 2 : 3;
    i.control = Control::kWarpSync;
    i.member_mask = 4;
    i.execute = hShfl;
    return true;
  }
  if (op == "vote") {
    if (!p.has("sync")) return false;
    i.variant = p.has("all") ? 0 : p.has("any") ? 1 : p.has("uni") ? 2 : 3;
    i.control = Control::kWarpSync;
    i.member_mask = 2;
    i.execute = hVote;
    return true;
  }
  if (op == "match") {
    i.variant = p.has("all");
    i.control = Control::kWarpSync;
    i.member_mask = 2;
    i.execute = hMatch;
    return true;
  }
  if (op == "redux") {
    static const char* n[] = {"add", "min", "max", "and", "or", "xor"};
    for (int k = 0; k < 6; k++)
      if (p.has(n[k])) i.variant = k;
    i.flag = p.has("abs");
    i.control = Control::kWarpSync;
    i.member_mask = 2;
    i.execute = hRedux;
    return true;
  }
  if (op == "elect") {
    i.control = Control::kWarpSync;
    i.member_mask = 1;
    i.execute = hElect;
    return true;
  }
  if (op == "activemask") {
    i.execute = hActive;
    return true;
  }
  if ((op == "bar" || op == "barrier") && p.has("warp")) {
    i.control = Control::kWarpSync;
    i.member_mask = 0;
    i.execute = hSyncNop;
    return true;
  }
  if (op == "movmatrix") {
    i.control = Control::kWarpSync;
    i.aligned = true;
    i.execute = hMovmatrix;
    return true;
  }
  if (op == "wmma") {
    auto m = std::make_unique<MatrixMultiply>();
    std::vector<Type> ts;
    bool shape = false;
    for (auto& x : p.modifiers) {
      int a, b, c;
      if (sscanf(x.c_str(), "m%dn%dk%d", &a, &b, &c) == 3) {
        m->m = a;
        m->n = b;
        m->k = c;
        shape = true;
      } else if (parse_type(x) != Type::kNone)
        ts.push_back(parse_type(x));
      if (x == "satfinite") m->satfinite = true;
      if (x == "global") i.space = Space::kGlobal;
      if (x.rfind("shared", 0) == 0) i.space = Space::kShared;
    }
    for (Type t : ts)
      if (t == Type::kS4 || t == Type::kU4 || t == Type::kB1) return false;
    if (!shape || ts.empty()) return false;
    i.control = Control::kWarpSync;
    i.aligned = true;
    if (p.modifiers[0] == "mma") {
      if (ts.size() == 2) {
        m->d_type = ts[0];
        m->c_type = ts[1];
        m->a_type = m->b_type = Type::kF16;
      } else if (ts.size() == 4) {
        m->d_type = ts[0];
        m->a_type = ts[1];
        m->b_type = ts[2];
        m->c_type = ts[3];
      } else
        return false;
      for (int k = 0; k < 4; k++)
        if (i.operands[k].kind != OperandKind::kVector) return false;
      i.execute = hWmma;
    } else {
      i.second_flag = p.modifiers[0] == "store";
      i.variant = i.second_flag ? 2 : p.modifiers[1] == "a" ? 0 : p.modifiers[1] == "b" ? 1 : 2;
      i.flag = p.has("col");
      m->a_type = ts[0];
      if (i.operands[i.second_flag ? 1 : 0].kind != OperandKind::kVector) return false;
      i.execute = hWmmaMem;
    }
    i.matrix = std::move(m);
    return true;
  }
  if (op == "mma" || (op == "wgmma" && p.has("mma_async"))) {
    if (p.has("sp") || p.mnemonic.find("::ordered") != std::string::npos || p.has("kind::mxf8f6f4"))
      return false;
    bool wg = op == "wgmma";
    auto m = std::make_unique<MatrixMultiply>();
    bool shape = false;
    std::vector<Type> ts;
    for (auto& x : p.modifiers) {
      int a, b, c;
      if (sscanf(x.c_str(), "m%dn%dk%d", &a, &b, &c) == 3) {
        m->m = a;
        m->n = b;
        m->k = c;
        shape = true;
      } else if (parse_type(x) != Type::kNone)
        ts.push_back(parse_type(x));
      if (x == "satfinite") m->satfinite = true;
    }
    if (!shape) return false;
    if (wg) {
      if (ts.size() == 3) {
        m->d_type = m->c_type = ts[0];
        m->a_type = ts[1];
        m->b_type = ts[2];
      } else
        return false;
      if (m->d_type != Type::kF32 && m->d_type != Type::kF16) return false;
      bool rs = i.operands[1].kind == OperandKind::kVector;
      if (i.num_operands < 6 || m->m != 64) return false;
      auto cv = [&](int k) { return (int)p.operands[k].integer; };
      m->transposed_a = 0;
      if (rs) {
        if (p.operands.size() > 6) m->transposed_b = cv(6);
      } else if (p.operands.size() > 7) {
        m->transposed_a = cv(6);
        m->transposed_b = cv(7);
      } else if (p.operands.size() > 6)
        return false;
      i.flag = true;
      i.matrix = std::move(m);
      i.control = Control::kWarpSync;
      i.aligned = true;
      i.execute = hWgmma;
      return true;
    }
    if (ts.size() == 3) {
      m->d_type = m->c_type = ts[0];
      m->a_type = ts[1];
      m->b_type = ts[2];
    } else if (ts.size() == 4) {
      m->d_type = ts[0];
      m->a_type = ts[1];
      m->b_type = ts[2];
      m->c_type = ts[3];
    } else
      return false;
    auto take = [&](int k, Operand* out, int& n) {
      const Operand& o = i.operands[k];
      if (o.kind == OperandKind::kVector) {
        n = o.count;
        for (int z = 0; z < n && z < 16; z++) out[z] = i.elements[o.first + z];
      } else {
        n = 1;
        out[0] = o;
      }
    };
    take(0, m->d.data(), m->num_d);
    take(1, m->a.data(), m->num_a);
    take(2, m->b.data(), m->num_b);
    take(3, m->c.data(), m->num_c);
    if (!((m->m == 16 && m->n == 8) ||
          (m->m == 8 && m->n == 8 &&
           (m->a_type == Type::kF64 || m->a_type == Type::kS8 || m->a_type == Type::kU8 ||
            m->a_type == Type::kS4 || m->a_type == Type::kU4))))
      return false;
    if (m->a_type == Type::kB1 || m->k > 64) return false;
    int bt = bitsOf(m->a_type), e = bt >= 32 ? 1 : 32 / bt;
    if (m->num_a * 32 * e != m->m * m->k || m->num_b * 32 * e != m->n * m->k) return false;
    i.matrix = std::move(m);
    i.control = Control::kWarpSync;
    i.aligned = true;
    i.execute = hMma;
    return true;
  }
  if (op == "wgmma") {
    i.control = Control::kWarpSync;
    i.aligned = true;
    if (p.has("fence")) {
      i.execute = hSyncNop;
      return true;
    }
    if (p.has("commit_group")) {
      i.execute = hWgCommit;
      return true;
    }
    if (p.has("wait_group")) {
      i.control = Control::kWgmmaWait;
      i.immediate = (int)p.operands[0].integer;
      i.execute = hWgWait;
      return true;
    }
    return false;
  }
  return false;
}
}  // namespace mergeme::ptx
