// mem.cpp - loads, stores, atomics, asynchronous copies, mbarriers, bulk and tensor copies.
#include "csrc/ptx/vm.h"
static bool has(const PInst& p, const char* m) {
  for (auto& x : p.mods)
    if (x == m) return true;
  return false;
}
static bool hasPre(const PInst& p, const char* m) {
  size_t n = strlen(m);
  for (auto& x : p.mods)
    if (x.compare(0, n, m) == 0) return true;
  return false;
}
static std::string hex(u64 v) {
  char b[32];
  snprintf(b, sizeof b, "0x%llx", (unsigned long long)v);
  return b;
}

// ---------------------------------------------------------------- address resolution
// Two accesses to a byte, one of them a write, are in order if a barrier of the block lies between
// them, or if one warp makes them and a warp barrier lies between, or the same instruction or lane.
// A byte may not be written while an asynchronous copy to it is on its way.
void Warp::raceCheck(const Inst& i, Block* b, int lane, u32 off, u32 size, int acc) {
  if (b->complexSync) return;
  if (&i != accessed || accessedBy >> lane & 1) {
    accessed = &i;
    accessedBy = 0;
    accessSerial++;
  }
  accessedBy |= 1u << lane;
  if (b->shadow.empty()) b->shadow.resize(b->smemSize);
  u32 e = b->epoch;
  s16 me = (s16)id;
  const char* what = nullptr;
  u32 other = 0;
  for (u32 k = off; k < off + size; k++) {
    Shadow& s = b->shadow[k];
    const bool own_atomics = s.aw == me && s.wsync != warpBarriers;  // this warp's, long done
    const bool after_write = s.we == e && s.ww == me && s.wl != lane && s.wsync == warpBarriers &&
                             s.wserial != accessSerial;
    const bool after_read = s.re == e && s.rw == me && s.rl != lane && s.rsync == warpBarriers &&
                            s.rserial != accessSerial;
    if (after_write) {
      what = acc == 1 ? "read after another lane's write" : "write after another lane's write";
      other = s.wi;
    } else if (after_read && acc != 1) {
      what = "write after another lane's read";
      other = s.ri;
    }
    if (s.copies && acc != 1) {
      what = "write to where an asynchronous copy is on its way";
      other = s.wi;
    }
    if (acc == 1) {
      s.rl = s.re == e && s.rw == me && s.rsync == warpBarriers && s.rl != lane ? -2 : lane;
      s.rsync = warpBarriers;
      s.rserial = accessSerial;
    } else {
      s.wl = lane;
      s.wsync = warpBarriers;
      s.wserial = accessSerial;
    }
    if (acc == 1) {
      if (s.we == e && s.ww != me && s.ww != -2) {
        what = "read after write";
        other = s.wi;
      } else if (s.we == e && s.ww == -2 && !own_atomics) {
        what = "read after atomic";
        other = s.wi;
      }
      if (s.re != e) {
        s.re = e;
        s.rw = me;
      } else if (s.rw != me)
        s.rw = -1;
      s.ri = i.src->line;
    } else {
      bool at = acc == 3;
      if (s.we == e && s.ww != me && !((at || own_atomics) && s.ww == -2)) {
        what = "write after write";
        other = s.wi;
      } else if (s.re == e && s.rw != me) {
        what = "write after read";
        other = s.ri;
      }
      s.aw = at && s.we == e && s.ww == -2 && s.aw != me ? -1 : me;
      s.we = e;
      s.ww = at ? -2 : me;
      s.wi = i.src->line;
    }
  }
  if (what) {
    L->nraces++;
    std::string m = std::string(what) + " without a barrier between: PTX line " +
                    std::to_string(other) + " and line " + std::to_string(i.src->line) + " (" +
                    i.src->text + ")";
    if (L->races.size() < 20) {
      for (auto& r : L->races)
        if (r == m) return;
      L->races.push_back(m);
    }
    if (L->c.flags & FL_RACE_ERR)
      fail(i, -1, "shared-memory hazard: " + m + ", shared offset " + std::to_string(off));
  }
}
u8* Warp::sharedPtr(const Inst& i, int l, u64 addr, u32 size, int acc) {
  u32 a = (u32)addr, rank = a >> 24, off = a & 0xffffff;
  Block* b = blk;
  if (addr >> 32) fail(i, l, "shared address " + hex(addr) + " has bits above 32");
  if (rank) {
    if (rank - 1 >= blk->cluster->size())
      fail(i, l, "shared::cluster address " + hex(addr) + " names no block of the cluster");
    b = (*blk->cluster)[rank - 1];
    if (b->done) fail(i, l, "shared memory of a block that has exited");
  }
  if (off < SHB || off + size > SHB + b->smemSize)
    fail(i, l,
         "shared access of " + std::to_string(size) + " bytes at offset " +
             std::to_string((s64)off - (s64)SHB) + " is outside the block's " +
             std::to_string(b->smemSize) + " bytes");
  if (off & (size - 1))
    fail(i, l,
         "misaligned shared access of " + std::to_string(size) + " bytes at offset " +
             std::to_string(off - SHB));
  accShared = true;
  if (L->race) raceCheck(i, b, l, off - (u32)SHB, size, acc);
  return b->smem + (off - SHB);
}
u8* Warp::globalPtr(const Inst& i, int l, u64 addr, u32 size, int acc) {
  accShared = false;
  if (addr & (size - 1))
    fail(i, l, "misaligned global access of " + std::to_string(size) + " bytes at " + hex(addr));
  auto& R = L->ranges;
  if (lastRange < R.size()) {
    auto& r = R[lastRange];
    if (addr >= r.lo && addr + size <= r.hi) {
      if (acc >= 2 && r.ro) fail(i, l, "write to read-only buffer " + r.name);
      return (u8*)addr;
    }
  }
  auto it =
      std::upper_bound(R.begin(), R.end(), addr, [](u64 a, const Range& r) { return a < r.lo; });
  if (it != R.begin()) {
    --it;
    if (addr + size <= it->hi) {
      lastRange = it - R.begin();
      if (acc >= 2 && it->ro) fail(i, l, "write to read-only buffer " + it->name);
      return (u8*)addr;
    }
  }
  if (addr < 65536) fail(i, l, "NULL pointer access at " + hex(addr));
  std::string near = "";
  u64 best = ~0ull;
  for (auto& r : R) {
    u64 d = addr < r.lo ? r.lo - addr : addr + size - r.hi;
    if (d < best && d < (1ull << 32)) {
      best = d;
      near = addr < r.lo ? ", " + std::to_string(r.lo - addr) + " bytes before buffer " + r.name
                         : ", at byte " + std::to_string(addr - r.lo) + " of buffer " + r.name +
                               " of " + std::to_string(r.hi - r.lo) + " bytes";
    }
  }
  fail(i, l,
       std::string("global ") + (acc == 1 ? "read" : "write") + " of " + std::to_string(size) +
           " bytes at " + hex(addr) + " is outside every registered buffer" + near);
}
static Block* sharedOwner(Warp* w, u64 addr) {
  if (addr - (u64)w->blk->smem < w->blk->smemSize) return w->blk;
  for (Block* b : *w->blk->cluster)
    if (addr - (u64)b->smem < b->smemSize) return b;
  return nullptr;
}
u8* Warp::resolve(const Inst& i, int l, u64 addr, u32 size, int sp, int acc) {
  switch (sp) {
    case SP_SHARED:
      return sharedPtr(i, l, addr, size, acc);
    case SP_GLOBAL:
      return globalPtr(i, l, addr, size, acc);
    case SP_CONST:
      if (acc != 1) fail(i, l, "write to constant memory");
      return globalPtr(i, l, addr, size, 1);
    case SP_LOCAL: {
      accShared = false;
      u64 o = addr - LOCB;
      if (addr < LOCB || o + size > localSize)
        fail(i, l, "local access outside the thread's " + std::to_string(localSize) + " bytes");
      if (addr & (size - 1)) fail(i, l, "misaligned local access");
      return localBuf + (u64)l * localSize + o;
    }
    case SP_PARAM: {
      accShared = false;
      Frame& f = *st.back();
      if (st.size() == 1 && f.f->entry && (addr < L->nparams || f.f->paramSpace == 0 || true) &&
          !i.flag2) {
        if (addr + size > L->nparams)
          fail(i, l,
               "parameter access at byte " + std::to_string(addr) + " beyond the " +
                   std::to_string(L->nparams) + " bytes passed");
        if (acc != 1) fail(i, l, "write to kernel parameters");
        return (u8*)L->params + addr;
      }
      u64 per = f.param.size() / 32;
      if (addr + size > per) fail(i, l, "call parameter access out of range");
      return f.param.data() + l * per + addr;
    }
    default: {
      if (Block* b = sharedOwner(this, addr)) {
        accShared = true;
        u64 off = addr - (u64)b->smem;
        if (off + size > b->smemSize)
          fail(i, l, "shared (generic) access outside the block's shared memory");
        if (off & (size - 1))
          fail(i, l,
               "misaligned shared access of " + std::to_string(size) + " bytes at offset " +
                   std::to_string(off));
        if (L->race) raceCheck(i, b, l, (u32)off, size, acc);
        return (u8*)addr;
      }
      if (localSize && addr - (u64)localBuf < 32 * localSize) {
        accShared = false;
        u64 o = addr - (u64)localBuf;
        if (o / localSize != (u64)l) fail(i, l, "access to another thread's local memory");
        if (o % localSize + size > localSize) fail(i, l, "local access out of range");
        if (addr & (size - 1)) fail(i, l, "misaligned local access");
        return (u8*)addr;
      }
      return globalPtr(i, l, addr, size, acc);
    }
  }
}
void Warp::statMem(const Inst& i, const u64* a, u32 mask, u32 size, bool shared, bool store) {
  int n = __builtin_popcount(mask);
  if (!n) return;
  (void)i;
  if (!shared) {
    u64 s[96];
    int c = 0;
    bool sorted = true;
    u64 last = 0;
    LANES(u64 x = a[l] >> 5; u64 y = (a[l] + size - 1) >> 5; for (; x <= y; x++) {
      if (c && x == last) continue;
      if (c && x < last) sorted = false;
      s[c++] = x;
      last = x;
    });
    if (!sorted) {
      std::sort(s, s + c);
      c = (int)(std::unique(s, s + c) - s);
    }
    u64 ideal = std::min<u64>(c, ((u64)n * size + 31) / 32);
    if (store) {
      L->gstReq++;
      L->gstSec += c;
      L->gstIdeal += ideal;
    } else {
      L->gldReq++;
      L->gldSec += c;
      L->gldIdeal += ideal;
    }
    L->gbytes += (u64)n * size;
  } else {
    int per = size <= 4 ? 32 : size == 8 ? 16 : 8;
    u64 waves = 0, ideal = 0;
    for (int g = 0; g < 32; g += per) {
      u32 gm = mask & ((per == 32 ? ~0u : ((1u << per) - 1)) << g);
      if (!gm) continue;
      u8 cnt[32] = {0};
      u32 words[32][32];
      int mx = 0;
      for (u32 m = gm; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        u32 w0 = (u32)(a[l] >> 2), w1 = (u32)((a[l] + size - 1) >> 2);
        for (u32 x = w0; x <= w1; x++) {
          int b = x & 31;
          bool dup = false;
          for (int k = 0; k < cnt[b]; k++)
            if (words[b][k] == x) {
              dup = true;
              break;
            }
          if (!dup) {
            words[b][cnt[b]++] = x;
            if (cnt[b] > mx) mx = cnt[b];
          }
        }
      }
      waves += mx;
      ideal++;
    }
    L->shReq++;
    L->shWave += waves;
    L->shIdeal += ideal;
    L->sbytes += (u64)n * size;
  }
}
static inline u64 ldval(const u8* p, Ty t, int w) {
  switch (t) {
    case U8:
    case B8:
      return *p;
    case S8:
      return maskw((u64)(s64)(s8)*p, w);
    case U16:
    case B16:
    case F16:
    case BF16: {
      u16 v;
      memcpy(&v, p, 2);
      return v;
    }
    case S16: {
      s16 v;
      memcpy(&v, p, 2);
      return maskw((u64)(s64)v, w);
    }
    case U64:
    case B64:
    case S64:
    case F64: {
      u64 v;
      memcpy(&v, p, 8);
      return v;
    }
    case S32: {
      s32 v;
      memcpy(&v, p, 4);
      return maskw((u64)(s64)v, w);
    }
    default: {
      u32 v;
      memcpy(&v, p, 4);
      return v;
    }
  }
}
static void hLd(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[1]);
  s64 off = i.o[1].off;
  if (i.o[1].localRel) off += w.frameLocal;
  int n = i.vecn, es = i.esz;
  u32 size = n * es;
  u64 ad[32];
  bool sh = false;
  const Opnd* d = i.o[0].kind == O_VEC ? &i.vec[i.o[0].vs] : &i.o[0];
  if (i.sp == SP_PARAM && i.o[1].bank == 1 && w.st.size() == 1 && !i.flag2) {
    u8* p = w.resolve(i, 0, a[0] + off, size, SP_PARAM, 1);
    for (int k = 0; k < n; k++) {
      u64 v = ldval(p + k * es, i.ty, d[k].w);
      u64* q = rowd(w, d[k]);
      LANES(q[l] = v;);
    }
    return;
  }
  u64 tmp[8][32];
  LANES(u64 x = a[l] + off; ad[l] = x; u8* p = w.resolve(i, l, x, size, i.sp, 1);
        if (w.accShared) sh = true;
        for (int k = 0; k < n; k++) tmp[k][l] = ldval(p + k * es, i.ty, d[k].w););
  for (int k = 0; k < n; k++) {
    u64* q = rowd(w, d[k]);
    LANES(q[l] = tmp[k][l];);
  }
  if (w.L->stats && i.sp != SP_PARAM && i.sp != SP_LOCAL && i.sp != SP_CONST)
    w.statMem(i, ad, mask, size, sh, false);
}
static void hSt(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[0]);
  s64 off = i.o[0].off;
  if (i.o[0].localRel) off += w.frameLocal;
  int n = i.vecn, es = i.esz;
  u32 size = n * es;
  u64 ad[32];
  bool sh = false;
  const Opnd* d = i.o[1].kind == O_VEC ? &i.vec[i.o[1].vs] : &i.o[1];
  const u64* s[8];
  for (int k = 0; k < n; k++) s[k] = row(w, d[k]);
  auto one = [&](int l) {
    u64 x = a[l] + off;
    ad[l] = x;
    u8* p = w.resolve(i, l, x, size, i.sp, 2);
    if (w.accShared) sh = true;
    for (int k = 0; k < n; k++) {
      u64 v = s[k][l];
      switch (es) {
        case 1:
          p[k] = (u8)v;
          break;
        case 2: {
          u16 z = (u16)v;
          memcpy(p + k * 2, &z, 2);
          break;
        }
        case 4: {
          u32 z = (u32)v;
          memcpy(p + k * 4, &z, 4);
          break;
        }
        default:
          memcpy(p + k * 8, &v, 8);
      }
    }
  };
  if (w.L->rev) {
    for (int l = 31; l >= 0; l--)
      if ((mask >> l) & 1) one(l);
  } else
    LANES(one(l););
  if (w.L->stats && i.sp != SP_PARAM && i.sp != SP_LOCAL) w.statMem(i, ad, mask, size, sh, true);
}
// ---------------------------------------------------------------- atomics
enum AOp { A_ADD, A_MIN, A_MAX, A_INC, A_DEC, A_CAS, A_EXCH, A_AND, A_OR, A_XOR };
static u64 atomApply(int op, Ty t, u64 old, u64 b, u64 c) {
  auto half2 = [&](Ty e, u64 x, u64 y) -> u64 {
    double p = decF(x & 0xffff, e), q = decF(y & 0xffff, e),
           r = op == A_ADD   ? p + q
               : p != p      ? q
               : q != q      ? p
               : op == A_MIN ? std::min(p, q)
                             : std::max(p, q);
    return encF(r, e, RN, false);
  };
  switch (t) {
    case F32: {
      float x = bitc<float>((u32)old), y = bitc<float>((u32)b);
      if (op == A_ADD) {
        float r = x + y;
        return r != r ? 0x7fffffff : bitc<u32>(r);
      }
      if (op == A_EXCH) return (u32)b;
      float r = x != x ? y : y != y ? x : op == A_MIN ? std::fmin(x, y) : std::fmax(x, y);
      return bitc<u32>(r);
    }
    case F64: {
      double x = bitc<double>(old), y = bitc<double>(b);
      if (op == A_ADD) return bitc<u64>(x + y);
      return b;
    }
    case F16:
    case BF16:
      return half2(t, old, b);
    case F16X2:
    case BF16X2: {
      Ty e = t == F16X2 ? F16 : BF16;
      return half2(e, old, b) | half2(e, old >> 16, b >> 16) << 16;
    }
    default:
      break;
  }
  int sz = tySize(t);
  u64 o = maskw(old, sz), x = maskw(b, sz), y = maskw(c, sz);
  auto sg = [&](u64 v) -> s64 { return sz == 4 ? (s64)(s32)v : (s64)v; };
  switch (op) {
    case A_ADD:
      return maskw(o + x, sz);
    case A_AND:
      return o & x;
    case A_OR:
      return o | x;
    case A_XOR:
      return o ^ x;
    case A_EXCH:
      return x;
    case A_CAS:
      return o == x ? y : o;
    case A_INC:
      return o >= x ? 0 : o + 1;
    case A_DEC:
      return (o == 0 || o > x) ? x : o - 1;
    case A_MIN:
      return tySigned(t) ? (sg(o) < sg(x) ? o : x) : std::min(o, x);
    case A_MAX:
      return tySigned(t) ? (sg(o) > sg(x) ? o : x) : std::max(o, x);
  }
  return o;
}
static void hAtom(Warp& w, const Inst& i, u32 mask) {
  bool red = i.flag;
  int mi = red ? 0 : 1;
  const u64* a = row(w, i.o[mi]);
  s64 off = i.o[mi].off;
  int es = i.esz, n = i.vecn;
  u64 ad[32];
  bool sh = false;
  auto E = [&](int k, int v) -> const Opnd& {
    return i.o[k].kind == O_VEC ? i.vec[i.o[k].vs + v] : i.o[k];
  };
  auto one = [&](int l) {
    u64 x = a[l] + off;
    ad[l] = x;
    u8* p = w.resolve(i, l, x, es * n, i.sp, 3);
    if (w.accShared) sh = true;
    u64 nv[8];
    for (int v = 0; v < n; v++) {
      u64 old = 0;
      memcpy(&old, p + v * es, es);
      u64 b = row(w, E(mi + 1, v))[l], c = i.mode == A_CAS ? row(w, i.o[mi + 2])[l] : 0;
      nv[v] = atomApply(i.mode, i.ty, old, b, c);
      if (!red && E(0, v).kind != O_SINK) rowd(w, E(0, v))[l] = old;
    }
    for (int v = 0; v < n; v++) memcpy(p + v * es, &nv[v], es);
  };
  if (w.L->rev) {
    for (int l = 31; l >= 0; l--)
      if ((mask >> l) & 1) one(l);
  } else
    LANES(one(l););
  if (w.L->stats) w.statMem(i, ad, mask, es * n, sh, true);
}
static void hAtom128(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[1]);
  s64 off = i.o[1].off;
  LANES(u8* p = w.resolve(i, l, a[l] + off, 16, i.sp, 3); u64 o[2]; memcpy(o, p, 16);
        const u64* b = row(w, i.o[2]); u64 x[2] = {b[l], b[l + 32]}; u64 nv[2] = {x[0], x[1]};
        if (i.mode == A_CAS) {
          const u64* c = row(w, i.o[3]);
          if (o[0] == x[0] && o[1] == x[1]) {
            nv[0] = c[l];
            nv[1] = c[l + 32];
          } else {
            nv[0] = o[0];
            nv[1] = o[1];
          }
        } memcpy(p, nv, 16);
        u64* d = rowd(w, i.o[0]); d[l] = o[0]; d[l + 32] = o[1];);
}
// ---------------------------------------------------------------- address-space conversion
static void hCvta(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  s64 off = i.o[1].kind == O_SYM ? 0 : 0;
  if (i.o[1].localRel) off += w.frameLocal;
  LANES(
      u64 x = a[l] + off; if (i.flag) {  // to a specific space
        if (i.sp == SP_SHARED) {
          Block* b = sharedOwner(&w, x);
          if (b)
            x = x - (u64)b->smem + SHB + (b == w.blk ? 0 : (u64)(b->rank + 1) << 24);
          else
            x = 0xffffffffull & (x | 0x80000000u);
        } else if (i.sp == SP_LOCAL)
          x = x - (u64)w.localBuf - (u64)l * w.localSize + LOCB;
        else if (i.sp == SP_PARAM)
          x = x - (u64)w.L->params;
      } else {
        if (i.sp == SP_SHARED) {
          u32 r = (u32)x >> 24;
          Block* b = r ? (*w.blk->cluster)[(r - 1) % w.blk->cluster->size()] : w.blk;
          x = (u64)b->smem + ((u32)x & 0xffffff) - SHB;
        } else if (i.sp == SP_LOCAL)
          x = x - LOCB + (u64)w.localBuf + (u64)l * w.localSize;
        else if (i.sp == SP_PARAM)
          x += (u64)w.L->params;
      } d[l] = x;);
}
static void hIsspacep(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[1]);
  u32 r = 0;
  LANES(u64 x = a[l]; Block* b = sharedOwner(&w, x);
        bool loc = w.localSize && x - (u64)w.localBuf < 32 * w.localSize;
        bool par = x - (u64)w.L->params < w.L->nparams; bool v = false; bool cst = false;
        for (auto& g : w.L->ranges) if (x >= g.lo && x < g.hi && g.space == SP_CONST) cst = true;
        switch (i.sp) {
          case SP_SHARED:
            v = i.flag ? b != nullptr : b == w.blk;
            break;
          case SP_LOCAL:
            v = loc;
            break;
          case SP_PARAM:
            v = par;
            break;
          case SP_CONST:
            v = cst;
            break;
          default:
            v = !b && !loc && !par && !cst;
        } if (v) r |= 1u << l;);
  u32& p = w.preds[i.o[0].idx];
  p = (p & ~mask) | r;
}
static void hMapa(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64 *a = row(w, i.o[1]), *b = row(w, i.o[2]);
  LANES(u64 x = a[l] + (i.o[1].kind == O_SYM ? 0 : 0); u32 r = (u32)b[l];
        if (r >= w.blk->cluster->size()) w.fail(i, l, "mapa: rank outside the cluster");
        if (i.sp == SP_SHARED) x = (x & 0xffffff) | (u64)(r + 1) << 24; else {
          Block* o = sharedOwner(&w, x);
          if (!o) w.fail(i, l, "mapa: not a shared address");
          x = x - (u64)o->smem + (u64)(*w.blk->cluster)[r]->smem;
        } d[l] = x;);
}
static void hGetctarank(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  const u64* a = row(w, i.o[1]);
  LANES(
      u64 x = a[l]; if (i.sp == SP_SHARED) {
        u32 r = (u32)x >> 24;
        d[l] = r ? r - 1 : w.blk->rank;
      } else {
        Block* o = sharedOwner(&w, x);
        if (!o) w.fail(i, l, "getctarank: not a shared address");
        d[l] = o->rank;
      });
}
// ---------------------------------------------------------------- cp.async
void Warp::landCp(int l, u64 groupBelow, u64 seqBelow) {
  auto& q = cp[l];
  size_t k = 0;
  for (auto& c : q) {
    if (c.group < groupBelow && c.seq < seqBelow) {
      u8* d = blk->smem + c.dst;
      memcpy(d, (void*)c.src, c.nsrc);
      if (c.nsrc < c.size) memset(d + c.nsrc, 0, c.size - c.nsrc);
      if (!blk->shadow.empty())
        for (u32 at = c.dst; at < c.dst + c.size; at++)
          if (blk->shadow[at].copies) blk->shadow[at].copies--;
      if (L->race && cur) raceCheck(*cur, blk, l, c.dst, c.size, 2);
    } else
      q[k++] = c;
  }
  q.resize(k);
}
static void poison(u8* p, u64 n) {
  static const u8 pat[4] = {0xc0, 0x7f, 0xc0, 0x7f};
  for (u64 k = 0; k < n; k++) p[k] = pat[((u64)p + k) & 3];
}
static void hCpAsync(Warp& w, const Inst& i, u32 mask) {
  const u64 *d = row(w, i.o[0]), *s = row(w, i.o[1]);
  u32 size = (u32)i.imm;
  u64 ad[32], sd[32];
  u32 lm = 0;
  LANES(
      u64 da = d[l] + i.o[0].off; u64 sa = s[l] + i.o[1].off; u32 n = size;
      if (i.no > 3 && i.o[3].kind != O_NONE) {
        if (i.o[3].kind == O_PRED) {
          bool ig = (w.preds[i.o[3].idx] >> l) & 1;
          if (ig != i.o[3].neg) n = 0;
        } else
          n = (u32)row(w, i.o[3])[l];
        if (n > size) w.fail(i, l, "cp.async src-size exceeds cp-size");
      } u8* dp = w.resolve(i, l, da, size, SP_SHARED, 2);
      if (sa & (size - 1)) w.fail(i, l, "misaligned cp.async source " + hex(sa)); if (n) {
        u32 n2 = n;
        u64 q = sa;
        while (n2) {
          u32 c = 1u << (31 - __builtin_clz(n2));
          w.globalPtr(i, l, q & ~(u64)(c - 1) ? q : q, (q & (c - 1)) ? 1 : c, 1);
          q += c;
          n2 -= c;
        }
        lm |= 1u << l;
      } ad[l] = sa;
      sd[l] = da; if (w.L->race && !w.blk->shadow.empty()) for (u32 k = 0; k < size; k++)
                      w.blk->shadow[dp - w.blk->smem + k]
                          .copies++;
      poison(dp, size); w.cp[l].push_back(
          {(u32)(dp - w.blk->smem), sa, size, n, w.cpGroup[l], w.cpSeq, i.src->line}););
  w.cpSeq++;
  if (w.L->stats) {
    w.statMem(i, ad, lm, size, false, false);
    w.statMem(i, sd, mask, size, true, true);
  }
}
static void hCpCommit(Warp& w, const Inst&, u32 mask) { LANES(w.cpGroup[l]++;); }
static void hCpWait(Warp& w, const Inst& i, u32 mask) {
  w.cur = &i;
  LANES(u64 g = i.flag                       ? ~0ull
                : w.cpGroup[l] >= (u64)i.imm ? w.cpGroup[l] - i.imm
                                             : 0;
        w.landCp(l, g, ~0ull););
}
// ---------------------------------------------------------------- mbarrier
static MBar& mbGet(Warp& w, const Inst& i, int l, u64 addr, Block*& b, u32& off) {
  u8* p;
  if (i.sp == SP_SHARED) {
    u32 r = (u32)addr >> 24;
    b = r ? (r - 1 < w.blk->cluster->size() ? (*w.blk->cluster)[r - 1] : nullptr) : w.blk;
    if (!b) w.fail(i, l, "mbarrier address outside the cluster");
    off = ((u32)addr & 0xffffff) - (u32)SHB;
    if ((u64)off + 8 > b->smemSize) w.fail(i, l, "mbarrier outside shared memory");
    p = b->smem + off;
  } else {
    b = sharedOwner(&w, addr);
    if (!b) w.fail(i, l, "mbarrier is not in shared memory");
    p = (u8*)addr;
    off = (u32)(p - b->smem);
  }
  if (off & 7) w.fail(i, l, "misaligned mbarrier");
  b->complexSync = true;
  w.blk->complexSync = true;
  auto it = b->mbars.find(off);
  if (it == b->mbars.end())
    w.fail(i, l, "mbarrier at shared offset " + std::to_string(off) + " was not initialised");
  u64 v;
  memcpy(&v, p, 8);
  if (v != it->second.opaque)
    w.fail(i, l, "mbarrier at shared offset " + std::to_string(off) + " was overwritten");
  return it->second;
}
static void mbStore(Block* b, u32 off, MBar& m) {
  m.opaque = 0x4d42ull << 48 | (m.phase & 0xfff) << 36 | (u64)(m.expected & 0xfff) << 24 |
             (u64)(m.pending & 0xfff) << 12 | ((u64)m.tx & 0xfff);
  memcpy(b->smem + off, &m.opaque, 8);
  b->L->progress++;
}
static void mbCheck(Block* b, u32 off, MBar& m) {
  if (m.pending == 0 && m.tx == 0) {
    m.phase++;
    m.pending = m.expected;
  }
  mbStore(b, off, m);
}
void Block::demand(u32 off) {  // the awaited phase is incomplete: let asynchronous work that
                               // signals this barrier finish
  for (size_t k = 0; k < pendArr.size();) {
    PendArr& a = pendArr[k];
    if (a.mbar == off) {
      PendArr c = a;
      pendArr.erase(pendArr.begin() + k);
      c.w->landCp(c.lane, ~0ull, c.upto);
      auto it = mbars.find(off);
      if (it != mbars.end()) {
        it->second.pending--;
        mbCheck(this, off, it->second);
      }
    } else
      k++;
  }
  for (Block* s : *cluster)
    for (size_t k = 0; k < s->pend.size();) {
      BulkOp* o = s->pend[k].get();
      if (o->mblk == this && o->mbar == off && !o->done) {
        o->read();
        o->land();
        o->done = true;
        auto it = mbars.find(off);
        if (it != mbars.end()) {
          it->second.tx -= o->bytes;
          mbCheck(this, off, it->second);
        }
        s->pend.erase(s->pend.begin() + k);
      } else
        k++;
    }
}
enum MOp {
  M_INIT,
  M_INVAL,
  M_EXPECT,
  M_COMPLETE,
  M_ARRIVE,
  M_ARRIVE_TX,
  M_TEST,
  M_PENDING,
  M_CPARRIVE,
  M_DROP,
  M_DROP_TX,
  M_NOCOMPLETE
};
static void hMbar(Warp& w, const Inst& i, u32 mask) {
  int mi = i.imm;
  const u64* a = row(w, i.o[mi]);
  s64 offs = i.o[mi].off;
  u32 pr = 0;
  w.waitFail = false;
  auto opv = [&](int k, int l) -> u64 { return row(w, i.o[k])[l]; };
  LANES(
      u64 addr = a[l] + offs; Block* b = nullptr; u32 off = 0; if (i.mode == M_INIT) {
        u8* p = w.resolve(i, l, addr, 8, i.sp, 2);
        Block* o = w.blk;
        off = (u32)(p - o->smem);
        u32 n = (u32)opv(mi + 1, l);
        if (n == 0 || n > 0xfffff) w.fail(i, l, "mbarrier.init with count " + std::to_string(n));
        MBar m{n, n, 0, 0, 0};
        o->mbars[off] = m;
        mbStore(o, off, o->mbars[off]);
        o->complexSync = true;
        continue;
      } MBar& m = mbGet(w, i, l, addr, b, off);
      switch (i.mode) {
        case M_INVAL:
          b->mbars.erase(off);
          break;
        case M_EXPECT:
          m.tx += (s64)(u32)opv(mi + 1, l);
          mbStore(b, off, m);
          break;
        case M_COMPLETE:
          m.tx -= (s64)(u32)opv(mi + 1, l);
          mbCheck(b, off, m);
          break;
        case M_ARRIVE:
        case M_ARRIVE_TX:
        case M_DROP:
        case M_DROP_TX:
        case M_NOCOMPLETE: {
          u32 n = 1;
          bool tx = i.mode == M_ARRIVE_TX || i.mode == M_DROP_TX;
          if (mi + 1 < i.no) {
            u64 v = opv(mi + 1, l);
            if (tx)
              m.tx += (s64)(u32)v;
            else
              n = (u32)v;
          }
          u64 tok = m.phase;
          if (i.mode == M_DROP || i.mode == M_DROP_TX) m.expected -= n;
          if (n > m.pending)
            w.fail(i, l,
                   "mbarrier at shared offset " + std::to_string(off) +
                       ": more arrivals than its count in one phase");
          m.pending -= n;
          mbCheck(b, off, m);
          if (mi == 1 && i.o[0].kind != O_SINK) rowd(w, i.o[0])[l] = tok;
          break;
        }
        case M_TEST: {
          u64 s = opv(mi + 1, l);
          auto done = [&] { return i.flag ? (m.phase & 1) != (s & 1) : m.phase != s; };
          if (!done()) b->demand(off);
          if (done())
            pr |= 1u << l;
          else
            w.waitFail = true;
          break;
        }
        case M_CPARRIVE:
          if (!i.flag) {
            m.pending++;
            mbStore(b, off, m);
          }
          b->pendArr.push_back({off, b, l, &w, (size_t)w.cpSeq, i.flag});
          w.L->progress++;
          break;
      });
  if (i.mode == M_TEST && i.o[0].kind == O_PRED) {
    u32& p = w.preds[i.o[0].idx];
    p = (p & ~mask) | pr;
  }
}
static void hMbPending(Warp& w, const Inst& i, u32 mask) {
  u64* d = rowd(w, i.o[0]);
  LANES(d[l] = 0;);
}
// ---------------------------------------------------------------- bulk copies
struct TMap {
  u64 magic, base;
  u32 rank, fmt;
  u64 dim[5], stride[4];
  u16 box[5];
  u8 es[5], swz, fill, esz, inter;
};
static_assert(sizeof(TMap) <= 128);
static u32 swzAddr(u32 a, int mode) {
  switch (mode) {
    case 3:
      return a ^ ((a >> 3) & 0x70);
    case 2:
      return a ^ ((a >> 3) & 0x30);
    case 1:
      return a ^ ((a >> 3) & 0x10);
    default:
      return a;
  }
}
template <class F>
static void tmaWalk(const TMap& t, const s32* c,
                    F f) {  // f(linear byte offset, global address or 0, n bytes) per element row
  s64 idx[5] = {0};
  u32 rowBytes = t.box[0] * t.esz;
  u64 rows = 1;
  for (u32 k = 1; k < t.rank; k++) rows *= t.box[k];
  for (u64 r = 0; r < rows; r++) {
    u64 x = r;
    bool in = true;
    u64 g = t.base;
    for (u32 k = 1; k < t.rank; k++) {
      idx[k] = c[k] + (s64)(x % t.box[k]) * t.es[k];
      x /= t.box[k];
      if (idx[k] < 0 || idx[k] >= (s64)t.dim[k]) in = false;
      g += idx[k] * t.stride[k - 1];
    }
    for (u32 e = 0; e < t.box[0]; e++) {
      s64 q = c[0] + (s64)e * t.es[0];
      bool ok = in && q >= 0 && q < (s64)t.dim[0];
      f((u32)(r * rowBytes + e * t.esz), ok ? g + q * t.esz : 0);
    }
  }
}
static void redBytes(u8* d, const u8* s, int op, Ty t) {
  int es = tySize(t);
  u64 o = 0, b = 0;
  memcpy(&o, d, es);
  memcpy(&b, s, es);
  u64 r = atomApply(op, t, o, b, 0);
  memcpy(d, &r, es);
}
static void tmaRead(Warp& w, const Inst& i, int l, u64 addr, TMap& t) {
  if (addr & 63) w.fail(i, l, "tensor map is not 64-byte aligned");
  u8* p = (addr - (u64)w.L->params < w.L->nparams) ? (u8*)addr
                                                   : w.resolve(i, l, addr, 64, SP_GENERIC, 1);
  memcpy(&t, p, sizeof t);
  if (t.magic != 0x50414d54584d5650ull) w.fail(i, l, "not a tensor map made by ptxvm.tensor_map");
  if (t.rank != (u32)i.imm) w.fail(i, l, "tensor map rank differs from the instruction's");
}
static void hBulk(Warp& w, const Inst& i, u32 mask) {
  // mode: 0 global->shared, 1 shared->global, 2 shared->shared, flag: tensor, flag2: reduce (cmp =
  // op)
  LANES({
    auto B = [&](int k) { return row(w, i.o[k])[l] + i.o[k].off; };
    if (!i.flag) {
      u32 n = (u32)row(w, i.o[2])[l];
      u64 da = B(0), sa = B(1);
      if (n & 15) w.fail(i, l, "cp.async.bulk size is not a multiple of 16");
      if (!n) continue;
      auto chk = [&](u64 a, int sp, int acc) -> u8* {
        u8* p = nullptr;
        if (a & 15) w.fail(i, l, "misaligned cp.async.bulk address");
        for (u32 k = 0; k < n; k += 16) {
          u8* q = w.resolve(i, l, a + k, 16, sp, acc);
          if (!k) p = q;
        }
        return p;
      };
      u8* dp = nullptr;
      u8* sp = chk(sa, i.mode == 0 ? SP_GLOBAL : SP_SHARED, 1);
      std::vector<Block*> tg;
      u16 cm = 0;
      if (i.mode == 0 && i.nan) {
        cm = (u16)row(w, i.o[4])[l];
        for (u32 r = 0; r < w.blk->cluster->size(); r++)
          if ((cm >> r) & 1) tg.push_back((*w.blk->cluster)[r]);
      }
      dp = chk(da, i.mode == 1 ? SP_GLOBAL : SP_SHARED, 2);
      if (i.mode == 1) {
        auto o = std::make_unique<BulkOp>();
        auto buf = std::make_shared<std::vector<u8>>(n);
        o->read = [=, p = o.get()] {
          if (!p->readDone) {
            memcpy(buf->data(), sp, n);
            p->readDone = true;
          }
        };
        bool rd = i.flag2;
        int rop = i.cmp;
        Ty rt = i.ty;
        o->land = [=] {
          if (rd) {
            for (u32 k = 0; k < n; k += tySize(rt)) redBytes(dp + k, buf->data() + k, rop, rt);
          } else
            memcpy(dp, buf->data(), n);
        };
        o->group = w.bulkGroup[l];
        if (w.L->rev) o->read();
        w.bulk[l].push_back(o.get());
        w.blk->pend.push_back(std::move(o));
      } else {
        u64 ma = B(3);
        std::vector<std::pair<Block*, u8*>> dst;
        if (tg.empty()) {
          Block* b = (u32)da >> 24 ? (*w.blk->cluster)[((u32)da >> 24) - 1] : w.blk;
          dst.push_back({b, dp});
        } else
          for (Block* b : tg) dst.push_back({b, b->smem + (dp - w.blk->smem)});
        bool first = true;
        for (auto& [b, p] : dst) {
          auto o = std::make_unique<BulkOp>();
          u8* pp = p;
          poison(pp, n);
          bool rd = i.flag2;
          int rop = i.cmp;
          Ty rt = i.ty;
          (void)rd;
          (void)rop;
          (void)rt;
          o->read = [] {};
          o->land = [=] { memcpy(pp, sp, n); };
          o->bytes = n;
          Block* mb = nullptr;
          u32 mo;
          mbGet(w, i, l, ma, mb, mo);
          o->mblk = tg.empty() ? mb : b;
          o->mbar = mo;
          w.blk->pend.push_back(std::move(o));
          first = false;
        }
        (void)first;
      }
    } else {
      const Opnd& tm = i.mode == 1 ? i.o[0] : i.o[1];
      const Opnd& so = i.mode == 1 ? i.o[1] : i.o[0];
      TMap t;
      tmaRead(w, i, l, row(w, tm)[l] + tm.off, t);
      s32 c[5];
      for (u32 k = 0; k < t.rank; k++) c[k] = (s32)row(w, i.vec[tm.vs + k])[l];
      u64 sa = row(w, so)[l] + so.off;
      u32 bytes = t.esz;
      for (u32 k = 0; k < t.rank; k++) bytes *= t.box[k];
      u32 off = ((u32)sa & 0xffffff) - (u32)SHB;
      Block* db = (u32)sa >> 24 ? (*w.blk->cluster)[((u32)sa >> 24) - 1] : w.blk;
      if ((u64)off + bytes > db->smemSize) w.fail(i, l, "tensor copy outside shared memory");
      u32 al = t.swz ? 128 : 16;
      if (off & (al - 1))
        w.fail(i, l, "tensor copy: shared address not " + std::to_string(al) + "-byte aligned");
      if (t.base & 15) w.fail(i, l, "tensor map base not 16-byte aligned");
      tmaWalk(t, c, [&](u32, u64 g) {
        if (g && !(i.mode == 1 ? false : false)) {
          auto& R = w.L->ranges;
          if (w.lastRange < R.size() && g >= R[w.lastRange].lo && g + t.esz <= R[w.lastRange].hi)
            return;
          w.globalPtr(i, l, g, t.esz, i.mode == 1 ? 2 : 1);
        }
      });
      if (i.mode == 1) {
        auto o = std::make_unique<BulkOp>();
        auto buf = std::make_shared<std::vector<u8>>(bytes);
        u8* sm = db->smem;
        std::vector<s32> cc(c, c + 5);
        o->read = [=, p = o.get()] {
          if (p->readDone) return;
          p->readDone = true;
          for (u32 k = 0; k < bytes; k += 16)
            memcpy(buf->data() + k, sm + swzAddr(off + k, t.swz), std::min(16u, bytes - k));
        };
        bool rd = i.flag2;
        int rop = i.cmp;
        Ty rt = t.fmt == 9 ? BF16 : t.fmt == 6 ? F16 : t.fmt == 7 ? F32 : t.fmt == 4 ? S32 : U32;
        o->land = [=] {
          tmaWalk(t, cc.data(), [&](u32 lo, u64 g) {
            if (g) {
              if (rd)
                redBytes((u8*)g, buf->data() + lo, rop, rt);
              else
                memcpy((void*)g, buf->data() + lo, t.esz);
            }
          });
        };
        o->group = w.bulkGroup[l];
        if (w.L->rev) o->read();
        w.bulk[l].push_back(o.get());
        w.blk->pend.push_back(std::move(o));
      } else {
        u64 ma = row(w, i.o[2])[l] + i.o[2].off;
        std::vector<Block*> tg;
        bool mc = i.nan;
        if (mc) {
          u16 cm = (u16)row(w, i.o[3])[l];
          for (u32 r = 0; r < w.blk->cluster->size(); r++)
            if ((cm >> r) & 1) tg.push_back((*w.blk->cluster)[r]);
        } else
          tg.push_back(db);
        for (Block* b : tg) {
          u8* sm = b->smem;
          for (u32 k = 0; k < bytes; k += 16)
            poison(sm + swzAddr(off + k, t.swz), std::min(16u, bytes - k));
          auto o = std::make_unique<BulkOp>();
          std::vector<s32> cc(c, c + 5);
          o->read = [] {};
          o->land = [=] {
            std::vector<u8> buf(bytes);
            tmaWalk(t, cc.data(), [&](u32 lo, u64 g) {
              if (g)
                memcpy(&buf[lo], (void*)g, t.esz);
              else if (t.fill && t.esz == 2) {
                u16 v = t.fmt == 6 ? 0x7e00 : 0x7fc0;
                memcpy(&buf[lo], &v, 2);
              } else
                memset(&buf[lo], 0, t.esz);
            });
            for (u32 k = 0; k < bytes; k += 16)
              memcpy(sm + swzAddr(off + k, t.swz), &buf[k], std::min(16u, bytes - k));
          };
          o->bytes = bytes;
          Block* mb = nullptr;
          u32 mo;
          mbGet(w, i, l, ma, mb, mo);
          o->mblk = mc ? b : mb;
          o->mbar = mo;
          w.blk->pend.push_back(std::move(o));
        }
      }
    }
    w.L->progress++;
  });
}
static void hBulkCommit(Warp& w, const Inst&, u32 mask) { LANES(w.bulkGroup[l]++;); }
static void bulkWait(Warp& w, int l, u64 below, bool readOnly) {
  auto& q = w.bulk[l];
  size_t k = 0;
  for (BulkOp* o : q) {
    if (o->group < below) {
      o->read();
      if (!readOnly) {
        o->land();
        auto& P = w.blk->pend;
        for (size_t z = 0; z < P.size(); z++)
          if (P[z].get() == o) {
            P.erase(P.begin() + z);
            break;
          }
        continue;
      }
    }
    q[k++] = o;
  }
  q.resize(k);
}
static void hBulkWait(Warp& w, const Inst& i, u32 mask) {
  LANES(u64 g = w.bulkGroup[l] >= (u64)i.imm ? w.bulkGroup[l] - i.imm : 0;
        bulkWait(w, l, g, i.flag););
}
void drainAsync(Warp& w, int l) {
  w.cur = nullptr;
  w.landCp(l, ~0ull, ~0ull);
  bulkWait(w, l, ~0ull, false);
}
static void hTmReplace(
    Warp& w, const Inst& i,
    u32 mask) {  // tensormap.replace.tile.field[.space].b1024.type [addr], (ord,) new_val
  const u64* a = row(w, i.o[0]);
  LANES(u64 ad = a[l] + i.o[0].off; u8* p = w.resolve(i, l, ad, 64, i.sp, 2); TMap t;
        memcpy(&t, p, sizeof t); if (t.magic != 0x50414d54584d5650ull)
                                     w.fail(i, l, "tensormap.replace: not a ptxvm tensor map");
        u64 v = row(w, i.o[i.no - 1])[l]; u32 k = i.no > 2 ? (u32)row(w, i.o[1])[l] : 0;
        switch (i.mode) {
          case 0:
            t.base = v;
            break;
          case 1:
            t.rank = (u32)v + 1;
            break;
          case 2:
            t.box[k] = (u16)v;
            break;
          case 3:
            t.dim[k] = (u32)v;
            break;
          case 4:
            t.stride[k] = v;
            break;
          case 5:
            t.es[k] = (u8)v;
            break;
          case 6:
            t.fmt = (u32)v;
            break;
          case 7:
            break;
          case 8:
            t.swz = (u8)v;
            break;
          case 9:
            t.fill = (u8)v;
            break;
        } memcpy(p, &t, sizeof t););
}
static void hTmCp(Warp& w, const Inst& i, u32 mask) {
  const u64 *a = row(w, i.o[0]), *b = row(w, i.o[1]);
  LANES(u8* d = w.resolve(i, l, a[l] + i.o[0].off, 64, SP_GENERIC, 2);
        u8* s = w.resolve(i, l, b[l] + i.o[1].off, 64, SP_SHARED, 1); memcpy(d, s, 128); break;);
}
static void hNop(Warp&, const Inst&, u32) {}
static void hFenceP(Warp& w, const Inst&, u32) { w.L->fences++; }
// ---------------------------------------------------------------- ldmatrix and friends
static void hLdmatrix(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[1]);
  int n = i.vecn;
  u64 ad[32];
  u8* p[32];
  const Opnd* d = i.o[0].kind == O_VEC ? &i.vec[i.o[0].vs] : &i.o[0];
  for (int l = 0; l < 8 * n; l++) {
    ad[l] = a[l] + i.o[1].off;
    p[l] = w.resolve(i, l, ad[l], 16, i.sp, 1);
  }
  for (int m = 0; m < n; m++) {
    u64* q = rowd(w, d[m]);
    for (int l = 0; l < 32; l++) {
      u16 x[2];
      for (int k = 0; k < 2; k++) {
        int r = l >> 2, c = (l & 3) * 2 + k;
        if (i.flag) std::swap(r, c);
        memcpy(&x[k], p[m * 8 + r] + c * 2, 2);
      }
      q[l] = x[0] | (u32)x[1] << 16;
    }
  }
  if (w.L->stats) w.statMem(i, ad, n == 4 ? ~0u : (1u << (8 * n)) - 1, 16, true, false);
  (void)mask;
}
static void hStmatrix(Warp& w, const Inst& i, u32 mask) {
  const u64* a = row(w, i.o[0]);
  int n = i.vecn;
  u64 ad[32];
  u8* p[32];
  const Opnd* d = i.o[1].kind == O_VEC ? &i.vec[i.o[1].vs] : &i.o[1];
  for (int l = 0; l < 8 * n; l++) {
    ad[l] = a[l] + i.o[0].off;
    p[l] = w.resolve(i, l, ad[l], 16, i.sp, 2);
  }
  for (int m = 0; m < n; m++) {
    const u64* q = row(w, d[m]);
    for (int l = 0; l < 32; l++)
      for (int k = 0; k < 2; k++) {
        int r = l >> 2, c = (l & 3) * 2 + k;
        if (i.flag) std::swap(r, c);
        u16 x = (u16)(q[l] >> (16 * k));
        memcpy(p[m * 8 + r] + c * 2, &x, 2);
      }
  }
  if (w.L->stats) w.statMem(i, ad, n == 4 ? ~0u : (1u << (8 * n)) - 1, 16, true, true);
  (void)mask;
}
// ---------------------------------------------------------------- decode
bool decodeMem(Module&, Func*, Inst& i, const PInst& p) {
  const std::string& op = p.op;
  Ty t = i.ty;
  for (auto& m : p.mods) {
    if (m == "global")
      i.sp = SP_GLOBAL;
    else if (m.rfind("shared", 0) == 0)
      i.sp = SP_SHARED;
    else if (m == "local")
      i.sp = SP_LOCAL;
    else if (m == "const")
      i.sp = SP_CONST;
    else if (m.rfind("param", 0) == 0)
      i.sp = SP_PARAM;
  }
  if (op == "ld" || op == "ldu" || op == "st") {
    if (has(p, "async") || has(p, "bulk")) return false;
    bool st = op == "st";
    Opnd& d = i.o[st ? 1 : 0];
    i.vecn = d.kind == O_VEC ? d.vn : 1;
    i.esz = tySize(t);
    if (t == B128) {
      std::vector<Opnd> v;
      std::vector<Opnd> in;
      if (d.kind == O_VEC)
        in.assign(i.vec.begin() + d.vs, i.vec.begin() + d.vs + d.vn);
      else
        in.push_back(d);
      for (auto& x : in) {
        Opnd y = x;
        y.w = 8;
        v.push_back(y);
        if (x.kind != O_SINK) y.idx++;
        v.push_back(y);
      }
      d.kind = O_VEC;
      d.vs = (u16)i.vec.size();
      d.vn = (u16)v.size();
      i.vecn = (u8)v.size();
      i.vec.insert(i.vec.end(), v.begin(), v.end());
      i.ty = B64;
      i.esz = 8;
    }
    if (i.sp == SP_PARAM) {
      const POp& b = p.ops[st ? 0 : 1].sub[0];
      i.flag2 = b.k == O_SYM && !b.sym->ext;
    }
    i.fn = st ? hSt : hLd;
    return i.esz > 0;
  }
  if (op == "atom" || op == "red") {
    if (has(p, "async")) return false;
    static const char* n[] = {"add", "min", "max", "inc", "dec", "cas", "exch", "and", "or", "xor"};
    bool f = false;
    for (int k = 0; k < 10; k++)
      if (has(p, n[k])) {
        i.mode = k;
        f = true;
      }
    if (!f) return false;
    i.flag = op == "red";
    i.esz = tySize(t);
    int di = i.flag ? 1 : 2;
    i.vecn = i.o[di].kind == O_VEC ? i.o[di].vn : 1;
    if (t == B128) {
      i.fn = hAtom128;
      return !i.flag;
    }
    i.fn = hAtom;
    return i.esz > 0;
  }
  if (op == "cvta") {
    i.flag = has(p, "to");
    i.fn = hCvta;
    return true;
  }
  if (op == "isspacep") {
    i.flag = has(p, "shared::cluster");
    i.fn = hIsspacep;
    return true;
  }
  if (op == "mapa") {
    i.fn = hMapa;
    return true;
  }
  if (op == "getctarank") {
    i.fn = hGetctarank;
    return true;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    bool st = op[0] == 's';
    i.flag = has(p, "trans");
    if (!has(p, "m8n8") || !has(p, "b16")) return false;
    i.vecn = has(p, "x4") ? 4 : has(p, "x2") ? 2 : 1;
    i.ctl = C_WSYNC;
    i.aligned = true;
    i.fn = st ? hStmatrix : hLdmatrix;
    return true;
  }
  if (op == "cp") {
    if (has(p, "bulk")) {
      if (has(p, "commit_group")) {
        i.fn = hBulkCommit;
        return true;
      }
      if (has(p, "wait_group")) {
        i.imm = (int)p.ops[0].ival;
        i.flag = has(p, "read");
        i.fn = hBulkWait;
        return true;
      }
      if (has(p, "prefetch")) {
        i.fn = hNop;
        return true;
      }
      i.flag = has(p, "tensor");
      i.flag2 = has(p, "reduce");
      if (i.flag2) {
        static const char* n[] = {"add", "min", "max", "inc", "dec", "", "", "and", "or", "xor"};
        for (int k = 0; k < 10; k++)
          if (n[k][0] && has(p, n[k])) i.cmp = k;
      }
      i.nan = has(p, "multicast::cluster");
      int gi = -1, si = -1;
      for (int k = 0; k < (int)p.mods.size(); k++) {
        if (p.mods[k] == "global" && gi < 0) gi = k;
        if (p.mods[k].rfind("shared", 0) == 0 && si < 0) si = k;
      }
      if (hasPre(p, "im2col")) return false;
      i.mode = gi < 0 ? 2 : gi < si ? 1 : 0;
      for (int r = 1; r <= 5; r++)
        if (has(p, (std::to_string(r) + "d").c_str())) i.imm = r;
      i.sp = SP_SHARED;
      i.fn = hBulk;
      return true;
    }
    if (!has(p, "async")) return false;
    if (has(p, "commit_group")) {
      i.fn = hCpCommit;
      return true;
    }
    if (has(p, "wait_group")) {
      i.imm = (int)p.ops[0].ival;
      i.fn = hCpWait;
      return true;
    }
    if (has(p, "wait_all")) {
      i.flag = true;
      i.fn = hCpWait;
      return true;
    }
    if (has(p, "mbarrier")) {
      i.mode = M_CPARRIVE;
      i.imm = 0;
      i.flag = has(p, "noinc");
      i.fn = hMbar;
      return true;
    }
    i.imm = (int)p.ops[2].ival;
    if (i.imm != 4 && i.imm != 8 && i.imm != 16) return false;
    if (i.no > 3 && hasPre(p, "L2::cache_hint") && p.ops.size() == 4) i.no = 3;
    i.fn = hCpAsync;
    return true;
  }
  if (op == "mbarrier") {
    int mi = -1;
    for (int k = 0; k < (int)p.ops.size(); k++)
      if (p.ops[k].k == O_MEM) {
        mi = k;
        break;
      }
    i.imm = mi;
    i.fn = hMbar;
    bool tx = has(p, "expect_tx");
    if (has(p, "init"))
      i.mode = M_INIT;
    else if (has(p, "inval"))
      i.mode = M_INVAL;
    else if (has(p, "arrive_drop"))
      i.mode = tx ? M_DROP_TX : M_DROP;
    else if (has(p, "arrive"))
      i.mode = tx ? M_ARRIVE_TX : has(p, "noComplete") ? M_NOCOMPLETE : M_ARRIVE;
    else if (tx)
      i.mode = M_EXPECT;
    else if (has(p, "complete_tx"))
      i.mode = M_COMPLETE;
    else if (has(p, "test_wait") || has(p, "try_wait")) {
      i.mode = M_TEST;
      i.flag = has(p, "parity");
      i.ctl = C_TRYWAIT;
    } else if (has(p, "pending_count")) {
      i.fn = hMbPending;
      return true;
    } else
      return false;
    return mi >= 0;
  }
  if (op == "fence" || op == "membar") {
    i.fn = hFenceP;
    return true;
  }
  if (op == "tensormap") {
    if (has(p, "cp_fenceproxy")) {
      i.ctl = C_WSYNC;
      i.aligned = true;
      i.fn = hTmCp;
      return true;
    }
    static const char* n[] = {"global_address", "rank",           "box_dim",  "global_dim",
                              "global_stride",  "element_stride", "elemtype", "interleave_layout",
                              "swizzle_mode",   "fill_mode"};
    for (int k = 0; k < 10; k++)
      if (has(p, n[k])) {
        i.mode = k;
        i.fn = hTmReplace;
        if (i.sp == SP_GLOBAL) i.sp = SP_GENERIC;
        return true;
      }
    return false;
  }
  return false;
}
