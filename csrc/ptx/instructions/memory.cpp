// mem.cpp - loads, stores, atomics, asynchronous copies, mbarriers, bulk and tensor copies.
#include "csrc/ptx/instructions/instructions.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {

static inline uint64_t ldval(const uint8_t* p, Type t, int w) {
  switch (t) {
    case Type::kU8:
    case Type::kB8:
      return *p;
    case Type::kS8:
      return low_bytes((uint64_t)(int64_t)(int8_t)*p, w);
    case Type::kU16:
    case Type::kB16:
    case Type::kF16:
    case Type::kBF16: {
      uint16_t v;
      memcpy(&v, p, 2);
      return v;
    }
    case Type::kS16: {
      int16_t v;
      memcpy(&v, p, 2);
      return low_bytes((uint64_t)(int64_t)v, w);
    }
    case Type::kU64:
    case Type::kB64:
    case Type::kS64:
    case Type::kF64: {
      uint64_t v;
      memcpy(&v, p, 8);
      return v;
    }
    case Type::kS32: {
      int32_t v;
      memcpy(&v, p, 4);
      return low_bytes((uint64_t)(int64_t)v, w);
    }
    default: {
      uint32_t v;
      memcpy(&v, p, 4);
      return v;
    }
  }
}
static void hLd(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[1]);
  int64_t off = i.operands[1].offset;
  if (i.operands[1].in_frame) off += w.frame_local;
  int n = i.vector_size, es = i.element_size;
  uint32_t size = n * es;
  uint64_t ad[32];
  bool sh = false;
  const Operand* d = i.operands[0].kind == OperandKind::kVector ? &i.elements[i.operands[0].first]
                                                                : &i.operands[0];
  if (i.space == Space::kParam && i.operands[1].bank == Bank::kImmediates && w.frames.size() == 1 &&
      !i.call_param) {
    uint8_t* p = w.resolve(i, 0, a[0] + off, size, Space::kParam, Access::kRead);
    for (int k = 0; k < n; k++) {
      uint64_t v = ldval(p + k * es, i.type, d[k].width);
      uint64_t* q = result_row(w, d[k]);
      for_each_lane(mask, [&](int l) { q[l] = v; });
    }
    return;
  }
  uint64_t tmp[8][32];
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l] + off;
    ad[l] = x;
    uint8_t* p = w.resolve(i, l, x, size, i.space, Access::kRead);
    if (w.touched_shared) sh = true;
    for (int k = 0; k < n; k++) tmp[k][l] = ldval(p + k * es, i.type, d[k].width);
  });
  for (int k = 0; k < n; k++) {
    uint64_t* q = result_row(w, d[k]);
    for_each_lane(mask, [&](int l) { q[l] = tmp[k][l]; });
  }
  if (w.launch->options.statistics && i.space != Space::kParam && i.space != Space::kLocal &&
      i.space != Space::kConst)
    w.count_access(ad, mask, size, sh, false);
}
static void hSt(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[0]);
  int64_t off = i.operands[0].offset;
  if (i.operands[0].in_frame) off += w.frame_local;
  int n = i.vector_size, es = i.element_size;
  uint32_t size = n * es;
  uint64_t ad[32];
  bool sh = false;
  const Operand* d = i.operands[1].kind == OperandKind::kVector ? &i.elements[i.operands[1].first]
                                                                : &i.operands[1];
  const uint64_t* s[8];
  for (int k = 0; k < n; k++) s[k] = row(w, d[k]);
  auto one = [&](int l) {
    uint64_t x = a[l] + off;
    ad[l] = x;
    uint8_t* p = w.resolve(i, l, x, size, i.space, Access::kWrite);
    if (w.touched_shared) sh = true;
    for (int k = 0; k < n; k++) {
      uint64_t v = s[k][l];
      switch (es) {
        case 1:
          p[k] = (uint8_t)v;
          break;
        case 2: {
          uint16_t z = (uint16_t)v;
          memcpy(p + k * 2, &z, 2);
          break;
        }
        case 4: {
          uint32_t z = (uint32_t)v;
          memcpy(p + k * 4, &z, 4);
          break;
        }
        default:
          memcpy(p + k * 8, &v, 8);
      }
    }
  };
  if (w.launch->reverse_lanes) {
    for (int l = 31; l >= 0; l--)
      if ((mask >> l) & 1) one(l);
  } else
    for_each_lane(mask, [&](int l) { one(l); });
  if (w.launch->options.statistics && i.space != Space::kParam && i.space != Space::kLocal)
    w.count_access(ad, mask, size, sh, true);
}
// ---------------------------------------------------------------- atomics
static uint64_t atomApply(Reduction op, Type t, uint64_t old, uint64_t b, uint64_t c) {
  auto half2 = [&](Type e, uint64_t x, uint64_t y) -> uint64_t {
    double p = decode_float(x & 0xffff, e), q = decode_float(y & 0xffff, e),
           r = op == Reduction::kAdd   ? p + q
               : p != p                ? q
               : q != q                ? p
               : op == Reduction::kMin ? std::min(p, q)
                                       : std::max(p, q);
    return encode_float(r, e, Rounding::kRn, false);
  };
  switch (t) {
    case Type::kF32: {
      float x = std::bit_cast<float>((uint32_t)old), y = std::bit_cast<float>((uint32_t)b);
      if (op == Reduction::kAdd) {
        float r = x + y;
        return r != r ? 0x7fffffff : std::bit_cast<uint32_t>(r);
      }
      if (op == Reduction::kExch) return (uint32_t)b;
      float r = x != x ? y : y != y ? x : op == Reduction::kMin ? std::fmin(x, y) : std::fmax(x, y);
      return std::bit_cast<uint32_t>(r);
    }
    case Type::kF64: {
      double x = std::bit_cast<double>(old), y = std::bit_cast<double>(b);
      if (op == Reduction::kAdd) return std::bit_cast<uint64_t>(x + y);
      return b;
    }
    case Type::kF16:
    case Type::kBF16:
      return half2(t, old, b);
    case Type::kF16x2:
    case Type::kBF16x2: {
      Type e = t == Type::kF16x2 ? Type::kF16 : Type::kBF16;
      return half2(e, old, b) | half2(e, old >> 16, b >> 16) << 16;
    }
    default:
      break;
  }
  int sz = size_of(t);
  uint64_t o = low_bytes(old, sz), x = low_bytes(b, sz), y = low_bytes(c, sz);
  auto sg = [&](uint64_t v) -> int64_t { return sz == 4 ? (int64_t)(int32_t)v : (int64_t)v; };
  switch (op) {
    case Reduction::kAdd:
      return low_bytes(o + x, sz);
    case Reduction::kAnd:
      return o & x;
    case Reduction::kOr:
      return o | x;
    case Reduction::kXor:
      return o ^ x;
    case Reduction::kExch:
      return x;
    case Reduction::kCas:
      return o == x ? y : o;
    case Reduction::kInc:
      return o >= x ? 0 : o + 1;
    case Reduction::kDec:
      return (o == 0 || o > x) ? x : o - 1;
    case Reduction::kMin:
      return is_signed(t) ? (sg(o) < sg(x) ? o : x) : std::min(o, x);
    case Reduction::kMax:
      return is_signed(t) ? (sg(o) > sg(x) ? o : x) : std::max(o, x);
  }
  return o;
}
static void hAtom(Warp& w, const Instruction& i, uint32_t mask) {
  bool red = i.flag;
  int mi = red ? 0 : 1;
  const uint64_t* a = row(w, i.operands[mi]);
  int64_t off = i.operands[mi].offset;
  int es = i.element_size, n = i.vector_size;
  uint64_t ad[32];
  bool sh = false;
  auto E = [&](int k, int v) -> const Operand& {
    return i.operands[k].kind == OperandKind::kVector ? i.elements[i.operands[k].first + v]
                                                      : i.operands[k];
  };
  auto one = [&](int l) {
    uint64_t x = a[l] + off;
    ad[l] = x;
    uint8_t* p = w.resolve(i, l, x, es * n, i.space, Access::kAtomic);
    if (w.touched_shared) sh = true;
    uint64_t nv[8];
    for (int v = 0; v < n; v++) {
      uint64_t old = 0;
      memcpy(&old, p + v * es, es);
      uint64_t b = row(w, E(mi + 1, v))[l],
               c = i.reduction == Reduction::kCas ? row(w, i.operands[mi + 2])[l] : 0;
      nv[v] = atomApply(i.reduction, i.type, old, b, c);
      if (!red && E(0, v).kind != OperandKind::kSink) result_row(w, E(0, v))[l] = old;
    }
    for (int v = 0; v < n; v++) memcpy(p + v * es, &nv[v], es);
  };
  if (w.launch->reverse_lanes) {
    for (int l = 31; l >= 0; l--)
      if ((mask >> l) & 1) one(l);
  } else
    for_each_lane(mask, [&](int l) { one(l); });
  if (w.launch->options.statistics) w.count_access(ad, mask, es * n, sh, true);
}
static void hAtom128(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[1]);
  int64_t off = i.operands[1].offset;
  for_each_lane(mask, [&](int l) {
    uint8_t* p = w.resolve(i, l, a[l] + off, 16, i.space, Access::kAtomic);
    uint64_t o[2];
    memcpy(o, p, 16);
    const uint64_t* b = row(w, i.operands[2]);
    uint64_t x[2] = {b[l], b[l + 32]};
    uint64_t nv[2] = {x[0], x[1]};
    if (i.reduction == Reduction::kCas) {
      const uint64_t* c = row(w, i.operands[3]);
      if (o[0] == x[0] && o[1] == x[1]) {
        nv[0] = c[l];
        nv[1] = c[l + 32];
      } else {
        nv[0] = o[0];
        nv[1] = o[1];
      }
    }
    memcpy(p, nv, 16);
    uint64_t* d = result_row(w, i.operands[0]);
    d[l] = o[0];
    d[l + 32] = o[1];
  });
}
// ---------------------------------------------------------------- address-space conversion
static void hCvta(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  int64_t off = i.operands[1].kind == OperandKind::kSymbol ? 0 : 0;
  if (i.operands[1].in_frame) off += w.frame_local;
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l] + off;
    if (i.flag) {  // to a specific space
      if (i.space == Space::kShared) {
        Block* b = w.shared_owner(x);
        if (b)
          x = x - (uint64_t)b->shared + kSharedBase +
              (b == w.block ? 0 : (uint64_t)(b->rank + 1) << 24);
        else
          x = 0xffffffffull & (x | 0x80000000u);
      } else if (i.space == Space::kLocal)
        x = x - (uint64_t)w.local_memory - (uint64_t)l * w.local_bytes + kLocalBase;
      else if (i.space == Space::kParam)
        x = x - (uint64_t)w.launch->parameters;
    } else {
      if (i.space == Space::kShared) {
        uint32_t r = (uint32_t)x >> 24;
        Block* b = r ? (*w.block->cluster)[(r - 1) % w.block->cluster->size()] : w.block;
        x = (uint64_t)b->shared + ((uint32_t)x & 0xffffff) - kSharedBase;
      } else if (i.space == Space::kLocal)
        x = x - kLocalBase + (uint64_t)w.local_memory + (uint64_t)l * w.local_bytes;
      else if (i.space == Space::kParam)
        x += (uint64_t)w.launch->parameters;
    }
    d[l] = x;
  });
}
static void hIsspacep(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[1]);
  uint32_t r = 0;
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l];
    Block* b = w.shared_owner(x);
    bool loc = w.local_bytes && x - (uint64_t)w.local_memory < 32 * w.local_bytes;
    bool par = x - (uint64_t)w.launch->parameters < w.launch->parameter_bytes;
    bool v = false;
    bool cst = false;
    for (auto& g : w.launch->ranges)
      if (x >= g.begin && x < g.end && g.space == Space::kConst) cst = true;
    switch (i.space) {
      case Space::kShared:
        v = i.flag ? b != nullptr : b == w.block;
        break;
      case Space::kLocal:
        v = loc;
        break;
      case Space::kParam:
        v = par;
        break;
      case Space::kConst:
        v = cst;
        break;
      default:
        v = !b && !loc && !par && !cst;
    }
    if (v) r |= 1u << l;
  });
  uint32_t& p = w.predicates[i.operands[0].index];
  p = (p & ~mask) | r;
}
static void hMapa(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t *a = row(w, i.operands[1]), *b = row(w, i.operands[2]);
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l] + (i.operands[1].kind == OperandKind::kSymbol ? 0 : 0);
    uint32_t r = (uint32_t)b[l];
    if (r >= w.block->cluster->size()) w.fail(i, l, "mapa: rank outside the cluster");
    if (i.space == Space::kShared)
      x = (x & 0xffffff) | (uint64_t)(r + 1) << 24;
    else {
      Block* o = w.shared_owner(x);
      if (!o) w.fail(i, l, "mapa: not a shared address");
      x = x - (uint64_t)o->shared + (uint64_t)(*w.block->cluster)[r]->shared;
    }
    d[l] = x;
  });
}
static void hGetctarank(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  const uint64_t* a = row(w, i.operands[1]);
  for_each_lane(mask, [&](int l) {
    uint64_t x = a[l];
    if (i.space == Space::kShared) {
      uint32_t r = (uint32_t)x >> 24;
      d[l] = r ? r - 1 : w.block->rank;
    } else {
      Block* o = w.shared_owner(x);
      if (!o) w.fail(i, l, "getctarank: not a shared address");
      d[l] = o->rank;
    }
  });
}
// ---------------------------------------------------------------- cp.async
void Warp::land_async_copies(int l, uint64_t groupBelow, uint64_t seqBelow) {
  auto& q = async_copies[l];
  size_t k = 0;
  for (auto& c : q) {
    if (c.group < groupBelow && c.sequence < seqBelow) {
      uint8_t* d = block->shared + c.destination;
      memcpy(d, (void*)c.source, c.source_bytes);
      if (c.source_bytes < c.bytes) memset(d + c.source_bytes, 0, c.bytes - c.source_bytes);
      if (launch->check_races && current)
        check_race(*current, *block, c.destination, c.bytes, Access::kWrite);
    } else
      q[k++] = c;
  }
  q.resize(k);
}
static void poison(uint8_t* p, uint64_t n) {
  static const uint8_t pat[4] = {0xc0, 0x7f, 0xc0, 0x7f};
  for (uint64_t k = 0; k < n; k++) p[k] = pat[((uint64_t)p + k) & 3];
}
static void hCpAsync(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t *d = row(w, i.operands[0]), *s = row(w, i.operands[1]);
  uint32_t size = (uint32_t)i.immediate;
  uint64_t ad[32], sd[32];
  uint32_t lm = 0;
  for_each_lane(mask, [&](int l) {
    uint64_t da = d[l] + i.operands[0].offset;
    uint64_t sa = s[l] + i.operands[1].offset;
    uint32_t n = size;
    if (i.num_operands > 3 && i.operands[3].kind != OperandKind::kNone) {
      if (i.operands[3].kind == OperandKind::kPredicate) {
        bool ig = (w.predicates[i.operands[3].index] >> l) & 1;
        if (ig != i.operands[3].negated) n = 0;
      } else
        n = (uint32_t)row(w, i.operands[3])[l];
      if (n > size) w.fail(i, l, "cp.async src-size exceeds cp-size");
    }
    uint8_t* dp = w.resolve(i, l, da, size, Space::kShared, Access::kWrite);
    if (sa & (size - 1)) w.fail(i, l, "misaligned cp.async source " + hex(sa));
    if (n) {
      uint32_t n2 = n;
      uint64_t q = sa;
      while (n2) {
        uint32_t c = 1u << (31 - __builtin_clz(n2));
        w.resolve_global(i, l, q, (q & (c - 1)) ? 1 : c, Access::kRead);
        q += c;
        n2 -= c;
      }
      lm |= 1u << l;
    }
    ad[l] = sa;
    sd[l] = da;
    poison(dp, size);
    w.async_copies[l].push_back(
        {(uint32_t)(dp - w.block->shared), sa, size, n, w.async_group[l], w.async_sequence});
  });
  w.async_sequence++;
  if (w.launch->options.statistics) {
    w.count_access(ad, lm, size, false, false);
    w.count_access(sd, mask, size, true, true);
  }
}
static void hCpCommit(Warp& w, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int l) { w.async_group[l]++; });
}
static void hCpWait(Warp& w, const Instruction& i, uint32_t mask) {
  w.current = &i;
  for_each_lane(mask, [&](int l) {
    uint64_t g = i.flag                                      ? ~0ull
                 : w.async_group[l] >= (uint64_t)i.immediate ? w.async_group[l] - i.immediate
                                                             : 0;
    w.land_async_copies(l, g, ~0ull);
  });
}
// ---------------------------------------------------------------- mbarrier
static MBarrier& mbGet(Warp& w, const Instruction& i, int l, uint64_t addr, Block*& b,
                       uint32_t& off) {
  uint8_t* p;
  if (i.space == Space::kShared) {
    uint32_t r = (uint32_t)addr >> 24;
    b = r ? (r - 1 < w.block->cluster->size() ? (*w.block->cluster)[r - 1] : nullptr) : w.block;
    if (!b) w.fail(i, l, "mbarrier address outside the cluster");
    off = ((uint32_t)addr & 0xffffff) - (uint32_t)kSharedBase;
    if ((uint64_t)off + 8 > b->shared_bytes) w.fail(i, l, "mbarrier outside shared memory");
    p = b->shared + off;
  } else {
    b = w.shared_owner(addr);
    if (!b) w.fail(i, l, "mbarrier is not in shared memory");
    p = (uint8_t*)addr;
    off = (uint32_t)(p - b->shared);
  }
  if (off & 7) w.fail(i, l, "misaligned mbarrier");
  b->complex_sync = true;
  w.block->complex_sync = true;
  auto it = b->mbarriers.find(off);
  if (it == b->mbarriers.end())
    w.fail(i, l, "mbarrier at shared offset " + std::to_string(off) + " was not initialised");
  uint64_t v;
  memcpy(&v, p, 8);
  if (v != it->second.opaque)
    w.fail(i, l, "mbarrier at shared offset " + std::to_string(off) + " was overwritten");
  return it->second;
}
static void mbStore(Block* b, uint32_t off, MBarrier& m) {
  m.opaque = 0x4d42ull << 48 | (m.phase & 0xfff) << 36 | (uint64_t)(m.expected & 0xfff) << 24 |
             (uint64_t)(m.pending & 0xfff) << 12 | ((uint64_t)m.pending_bytes & 0xfff);
  memcpy(b->shared + off, &m.opaque, 8);
  b->launch->progress++;
}
static void mbCheck(Block* b, uint32_t off, MBarrier& m) {
  if (m.pending == 0 && m.pending_bytes == 0) {
    m.phase++;
    m.pending = m.expected;
  }
  mbStore(b, off, m);
}
void Block::complete_async_work(
    uint32_t off) {  // the awaited phase is incomplete: let asynchronous work that
                     // signals this barrier finish
  for (size_t k = 0; k < pending_arrivals.size();) {
    PendingArrival& a = pending_arrivals[k];
    if (a.mbarrier == off) {
      PendingArrival c = a;
      pending_arrivals.erase(pending_arrivals.begin() + k);
      c.warp->land_async_copies(c.lane, ~0ull, c.sequence);
      auto it = mbarriers.find(off);
      if (it != mbarriers.end()) {
        it->second.pending--;
        mbCheck(this, off, it->second);
      }
    } else
      k++;
  }
  for (Block* s : *cluster)
    for (size_t k = 0; k < s->bulk_copies.size();) {
      BulkCopy* o = s->bulk_copies[k].get();
      if (o->mbarrier_block == this && o->mbarrier == off) {
        o->read();
        o->land();
        auto it = mbarriers.find(off);
        if (it != mbarriers.end()) {
          it->second.pending_bytes -= o->bytes;
          mbCheck(this, off, it->second);
        }
        s->bulk_copies.erase(s->bulk_copies.begin() + k);
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
static void hMbar(Warp& w, const Instruction& i, uint32_t mask) {
  int mi = i.immediate;
  const uint64_t* a = row(w, i.operands[mi]);
  int64_t offs = i.operands[mi].offset;
  uint32_t pr = 0;
  w.wait_failed = false;
  auto opv = [&](int k, int l) -> uint64_t { return row(w, i.operands[k])[l]; };
  for_each_lane(mask, [&](int l) {
    uint64_t addr = a[l] + offs;
    Block* b = nullptr;
    uint32_t off = 0;
    if (i.variant == M_INIT) {
      uint8_t* p = w.resolve(i, l, addr, 8, i.space, Access::kWrite);
      Block* o = w.block;
      off = (uint32_t)(p - o->shared);
      uint32_t n = (uint32_t)opv(mi + 1, l);
      if (n == 0 || n > 0xfffff) w.fail(i, l, "mbarrier.init with count " + std::to_string(n));
      MBarrier m{n, n, 0, 0, 0};
      o->mbarriers[off] = m;
      mbStore(o, off, o->mbarriers[off]);
      o->complex_sync = true;
      return;
    }
    MBarrier& m = mbGet(w, i, l, addr, b, off);
    switch (i.variant) {
      case M_INVAL:
        b->mbarriers.erase(off);
        break;
      case M_EXPECT:
        m.pending_bytes += (int64_t)(uint32_t)opv(mi + 1, l);
        mbStore(b, off, m);
        break;
      case M_COMPLETE:
        m.pending_bytes -= (int64_t)(uint32_t)opv(mi + 1, l);
        mbCheck(b, off, m);
        break;
      case M_ARRIVE:
      case M_ARRIVE_TX:
      case M_DROP:
      case M_DROP_TX:
      case M_NOCOMPLETE: {
        uint32_t n = 1;
        bool tx = i.variant == M_ARRIVE_TX || i.variant == M_DROP_TX;
        if (mi + 1 < i.num_operands) {
          uint64_t v = opv(mi + 1, l);
          if (tx)
            m.pending_bytes += (int64_t)(uint32_t)v;
          else
            n = (uint32_t)v;
        }
        uint64_t tok = m.phase;
        if (i.variant == M_DROP || i.variant == M_DROP_TX) m.expected -= n;
        if (n > m.pending)
          w.fail(i, l,
                 "mbarrier at shared offset " + std::to_string(off) +
                     ": more arrivals than its count in one phase");
        m.pending -= n;
        mbCheck(b, off, m);
        if (mi == 1 && i.operands[0].kind != OperandKind::kSink)
          result_row(w, i.operands[0])[l] = tok;
        break;
      }
      case M_TEST: {
        uint64_t s = opv(mi + 1, l);
        auto done = [&] { return i.flag ? (m.phase & 1) != (s & 1) : m.phase != s; };
        if (!done()) b->complete_async_work(off);
        if (done())
          pr |= 1u << l;
        else
          w.wait_failed = true;
        break;
      }
      case M_CPARRIVE:
        if (!i.flag) {
          m.pending++;
          mbStore(b, off, m);
        }
        b->pending_arrivals.push_back({off, &w, l, w.async_sequence});
        w.launch->progress++;
        break;
    }
  });
  if (i.variant == M_TEST && i.operands[0].kind == OperandKind::kPredicate) {
    uint32_t& p = w.predicates[i.operands[0].index];
    p = (p & ~mask) | pr;
  }
}
static void hMbPending(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t* d = result_row(w, i.operands[0]);
  for_each_lane(mask, [&](int l) { d[l] = 0; });
}
// ---------------------------------------------------------------- bulk copies
struct TMap {
  uint64_t magic, base;
  uint32_t rank, fmt;
  uint64_t dim[5], stride[4];
  uint16_t box[5];
  uint8_t es[5], swz, fill, esz, inter;
};
static_assert(sizeof(TMap) <= 128);
static uint32_t swzAddr(uint32_t a, int mode) {
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
static void tmaWalk(const TMap& t, const int32_t* c,
                    F f) {  // f(linear byte offset, global address or 0, n bytes) per element row
  int64_t idx[5] = {0};
  uint32_t rowBytes = t.box[0] * t.esz;
  uint64_t rows = 1;
  for (uint32_t k = 1; k < t.rank; k++) rows *= t.box[k];
  for (uint64_t r = 0; r < rows; r++) {
    uint64_t x = r;
    bool in = true;
    uint64_t g = t.base;
    for (uint32_t k = 1; k < t.rank; k++) {
      idx[k] = c[k] + (int64_t)(x % t.box[k]) * t.es[k];
      x /= t.box[k];
      if (idx[k] < 0 || idx[k] >= (int64_t)t.dim[k]) in = false;
      g += idx[k] * t.stride[k - 1];
    }
    for (uint32_t e = 0; e < t.box[0]; e++) {
      int64_t q = c[0] + (int64_t)e * t.es[0];
      bool ok = in && q >= 0 && q < (int64_t)t.dim[0];
      f((uint32_t)(r * rowBytes + e * t.esz), ok ? g + q * t.esz : 0);
    }
  }
}
static void redBytes(uint8_t* d, const uint8_t* s, Reduction op, Type t) {
  int es = size_of(t);
  uint64_t o = 0, b = 0;
  memcpy(&o, d, es);
  memcpy(&b, s, es);
  uint64_t r = atomApply(op, t, o, b, 0);
  memcpy(d, &r, es);
}
static void tmaRead(Warp& w, const Instruction& i, int l, uint64_t addr, TMap& t) {
  if (addr & 63) w.fail(i, l, "tensor map is not 64-byte aligned");
  uint8_t* p = (addr - (uint64_t)w.launch->parameters < w.launch->parameter_bytes)
                   ? (uint8_t*)addr
                   : w.resolve(i, l, addr, 64, Space::kGeneric, Access::kRead);
  memcpy(&t, p, sizeof t);
  if (t.magic != 0x50414d54584d5650ull) w.fail(i, l, "not a tensor map made by ptxvm.tensor_map");
  if (t.rank != (uint32_t)i.immediate)
    w.fail(i, l, "tensor map rank differs from the instruction's");
}
static void hBulk(Warp& w, const Instruction& i, uint32_t mask) {
  // mode: 0 global->shared, 1 shared->global, 2 shared->shared, flag: tensor, flag2: reduce (cmp =
  // op)
  for_each_lane(mask, [&](int l) {
    {
      auto B = [&](int k) { return row(w, i.operands[k])[l] + i.operands[k].offset; };
      if (!i.flag) {
        uint32_t n = (uint32_t)row(w, i.operands[2])[l];
        uint64_t da = B(0), sa = B(1);
        if (n & 15) w.fail(i, l, "cp.async.bulk size is not a multiple of 16");
        if (!n) return;
        auto chk = [&](uint64_t a, Space sp, Access acc) -> uint8_t* {
          uint8_t* p = nullptr;
          if (a & 15) w.fail(i, l, "misaligned cp.async.bulk address");
          for (uint32_t k = 0; k < n; k += 16) {
            uint8_t* q = w.resolve(i, l, a + k, 16, sp, acc);
            if (!k) p = q;
          }
          return p;
        };
        uint8_t* dp = nullptr;
        uint8_t* sp = chk(sa, i.variant == 0 ? Space::kGlobal : Space::kShared, Access::kRead);
        std::vector<Block*> tg;
        uint16_t cm = 0;
        if (i.variant == 0 && i.multicast) {
          cm = (uint16_t)row(w, i.operands[4])[l];
          for (uint32_t r = 0; r < w.block->cluster->size(); r++)
            if ((cm >> r) & 1) tg.push_back((*w.block->cluster)[r]);
        }
        dp = chk(da, i.variant == 1 ? Space::kGlobal : Space::kShared, Access::kWrite);
        if (i.variant == 1) {
          auto o = std::make_unique<BulkCopy>();
          auto buf = std::make_shared<std::vector<uint8_t>>(n);
          o->read = [=, p = o.get()] {
            if (!p->was_read) {
              memcpy(buf->data(), sp, n);
              p->was_read = true;
            }
          };
          bool rd = i.second_flag;
          Reduction rop = i.reduction;
          Type rt = i.type;
          o->land = [=] {
            if (rd) {
              for (uint32_t k = 0; k < n; k += size_of(rt))
                redBytes(dp + k, buf->data() + k, rop, rt);
            } else
              memcpy(dp, buf->data(), n);
          };
          o->group = w.bulk_group[l];
          if (w.launch->reverse_lanes) o->read();
          w.bulk_copies[l].push_back(o.get());
          w.block->bulk_copies.push_back(std::move(o));
        } else {
          uint64_t ma = B(3);
          std::vector<std::pair<Block*, uint8_t*>> dst;
          if (tg.empty()) {
            Block* b = (uint32_t)da >> 24 ? (*w.block->cluster)[((uint32_t)da >> 24) - 1] : w.block;
            dst.push_back({b, dp});
          } else
            for (Block* b : tg) dst.push_back({b, b->shared + (dp - w.block->shared)});
          bool first = true;
          for (auto& [b, p] : dst) {
            auto o = std::make_unique<BulkCopy>();
            uint8_t* pp = p;
            poison(pp, n);
            bool rd = i.second_flag;
            Reduction rop = i.reduction;
            Type rt = i.type;
            (void)rd;
            (void)rop;
            (void)rt;
            o->read = [] {};
            o->land = [=] { memcpy(pp, sp, n); };
            o->bytes = n;
            Block* mb = nullptr;
            uint32_t mo;
            mbGet(w, i, l, ma, mb, mo);
            o->mbarrier_block = tg.empty() ? mb : b;
            o->mbarrier = mo;
            w.block->bulk_copies.push_back(std::move(o));
            first = false;
          }
          (void)first;
        }
      } else {
        const Operand& tm = i.variant == 1 ? i.operands[0] : i.operands[1];
        const Operand& so = i.variant == 1 ? i.operands[1] : i.operands[0];
        TMap t;
        tmaRead(w, i, l, row(w, tm)[l] + tm.offset, t);
        int32_t c[5];
        for (uint32_t k = 0; k < t.rank; k++) c[k] = (int32_t)row(w, i.elements[tm.first + k])[l];
        uint64_t sa = row(w, so)[l] + so.offset;
        uint32_t bytes = t.esz;
        for (uint32_t k = 0; k < t.rank; k++) bytes *= t.box[k];
        uint32_t off = ((uint32_t)sa & 0xffffff) - (uint32_t)kSharedBase;
        Block* db = (uint32_t)sa >> 24 ? (*w.block->cluster)[((uint32_t)sa >> 24) - 1] : w.block;
        if ((uint64_t)off + bytes > db->shared_bytes)
          w.fail(i, l, "tensor copy outside shared memory");
        uint32_t al = t.swz ? 128 : 16;
        if (off & (al - 1))
          w.fail(i, l, "tensor copy: shared address not " + std::to_string(al) + "-byte aligned");
        if (t.base & 15) w.fail(i, l, "tensor map base not 16-byte aligned");
        tmaWalk(t, c, [&](uint32_t, uint64_t g) {
          if (g && !(i.variant == 1 ? false : false)) {
            auto& R = w.launch->ranges;
            if (w.last_range < R.size() && g >= R[w.last_range].begin &&
                g + t.esz <= R[w.last_range].end)
              return;
            w.resolve_global(i, l, g, t.esz, i.variant == 1 ? Access::kWrite : Access::kRead);
          }
        });
        if (i.variant == 1) {
          auto o = std::make_unique<BulkCopy>();
          auto buf = std::make_shared<std::vector<uint8_t>>(bytes);
          uint8_t* sm = db->shared;
          std::vector<int32_t> cc(c, c + 5);
          o->read = [=, p = o.get()] {
            if (p->was_read) return;
            p->was_read = true;
            for (uint32_t k = 0; k < bytes; k += 16)
              memcpy(buf->data() + k, sm + swzAddr(off + k, t.swz), std::min(16u, bytes - k));
          };
          bool rd = i.second_flag;
          Reduction rop = i.reduction;
          Type rt = t.fmt == 9   ? Type::kBF16
                    : t.fmt == 6 ? Type::kF16
                    : t.fmt == 7 ? Type::kF32
                    : t.fmt == 4 ? Type::kS32
                                 : Type::kU32;
          o->land = [=] {
            tmaWalk(t, cc.data(), [&](uint32_t lo, uint64_t g) {
              if (g) {
                if (rd)
                  redBytes((uint8_t*)g, buf->data() + lo, rop, rt);
                else
                  memcpy((void*)g, buf->data() + lo, t.esz);
              }
            });
          };
          o->group = w.bulk_group[l];
          if (w.launch->reverse_lanes) o->read();
          w.bulk_copies[l].push_back(o.get());
          w.block->bulk_copies.push_back(std::move(o));
        } else {
          uint64_t ma = row(w, i.operands[2])[l] + i.operands[2].offset;
          std::vector<Block*> tg;
          bool mc = i.multicast;
          if (mc) {
            uint16_t cm = (uint16_t)row(w, i.operands[3])[l];
            for (uint32_t r = 0; r < w.block->cluster->size(); r++)
              if ((cm >> r) & 1) tg.push_back((*w.block->cluster)[r]);
          } else
            tg.push_back(db);
          for (Block* b : tg) {
            uint8_t* sm = b->shared;
            for (uint32_t k = 0; k < bytes; k += 16)
              poison(sm + swzAddr(off + k, t.swz), std::min(16u, bytes - k));
            auto o = std::make_unique<BulkCopy>();
            std::vector<int32_t> cc(c, c + 5);
            o->read = [] {};
            o->land = [=] {
              std::vector<uint8_t> buf(bytes);
              tmaWalk(t, cc.data(), [&](uint32_t lo, uint64_t g) {
                if (g)
                  memcpy(&buf[lo], (void*)g, t.esz);
                else if (t.fill && t.esz == 2) {
                  uint16_t v = t.fmt == 6 ? 0x7e00 : 0x7fc0;
                  memcpy(&buf[lo], &v, 2);
                } else
                  memset(&buf[lo], 0, t.esz);
              });
              for (uint32_t k = 0; k < bytes; k += 16)
                memcpy(sm + swzAddr(off + k, t.swz), &buf[k], std::min(16u, bytes - k));
            };
            o->bytes = bytes;
            Block* mb = nullptr;
            uint32_t mo;
            mbGet(w, i, l, ma, mb, mo);
            o->mbarrier_block = mc ? b : mb;
            o->mbarrier = mo;
            w.block->bulk_copies.push_back(std::move(o));
          }
        }
      }
      w.launch->progress++;
    }
  });
}
static void hBulkCommit(Warp& w, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int l) { w.bulk_group[l]++; });
}
void Warp::land_bulk_stores(int l, uint64_t below, bool readOnly) {
  auto& q = bulk_copies[l];
  size_t k = 0;
  for (BulkCopy* o : q) {
    if (o->group < below) {
      o->read();
      if (!readOnly) {
        o->land();
        auto& P = block->bulk_copies;
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
static void hBulkWait(Warp& w, const Instruction& i, uint32_t mask) {
  for_each_lane(mask, [&](int l) {
    uint64_t g = w.bulk_group[l] >= (uint64_t)i.immediate ? w.bulk_group[l] - i.immediate : 0;
    w.land_bulk_stores(l, g, i.flag);
  });
}
static void hTmReplace(
    Warp& w, const Instruction& i,
    uint32_t mask) {  // tensormap.replace.tile.field[.space].b1024.type [addr], (ord,) new_val
  const uint64_t* a = row(w, i.operands[0]);
  for_each_lane(mask, [&](int l) {
    uint64_t ad = a[l] + i.operands[0].offset;
    uint8_t* p = w.resolve(i, l, ad, 64, i.space, Access::kWrite);
    TMap t;
    memcpy(&t, p, sizeof t);
    if (t.magic != 0x50414d54584d5650ull) w.fail(i, l, "tensormap.replace: not a ptxvm tensor map");
    uint64_t v = row(w, i.operands[i.num_operands - 1])[l];
    uint32_t k = i.num_operands > 2 ? (uint32_t)row(w, i.operands[1])[l] : 0;
    switch (i.variant) {
      case 0:
        t.base = v;
        break;
      case 1:
        t.rank = (uint32_t)v + 1;
        break;
      case 2:
        t.box[k] = (uint16_t)v;
        break;
      case 3:
        t.dim[k] = (uint32_t)v;
        break;
      case 4:
        t.stride[k] = v;
        break;
      case 5:
        t.es[k] = (uint8_t)v;
        break;
      case 6:
        t.fmt = (uint32_t)v;
        break;
      case 7:
        break;
      case 8:
        t.swz = (uint8_t)v;
        break;
      case 9:
        t.fill = (uint8_t)v;
        break;
    }
    memcpy(p, &t, sizeof t);
  });
}
static void hTmCp(Warp& w, const Instruction& i, uint32_t mask) {
  // one copy for the whole warp
  const int l = std::countr_zero(mask);
  const uint64_t to = row(w, i.operands[0])[l] + i.operands[0].offset;
  const uint64_t from = row(w, i.operands[1])[l] + i.operands[1].offset;
  uint8_t* d = w.resolve(i, l, to, 64, Space::kGeneric, Access::kWrite);
  uint8_t* s = w.resolve(i, l, from, 64, Space::kShared, Access::kRead);
  memcpy(d, s, 128);
}
static void hNop(Warp&, const Instruction&, uint32_t) {}
static void hFenceP(Warp& w, const Instruction&, uint32_t) { w.launch->statistics.fences++; }
// ---------------------------------------------------------------- ldmatrix and friends
static void hLdmatrix(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[1]);
  int n = i.vector_size;
  uint64_t ad[32];
  uint8_t* p[32];
  const Operand* d = i.operands[0].kind == OperandKind::kVector ? &i.elements[i.operands[0].first]
                                                                : &i.operands[0];
  for (int l = 0; l < 8 * n; l++) {
    ad[l] = a[l] + i.operands[1].offset;
    p[l] = w.resolve(i, l, ad[l], 16, i.space, Access::kRead);
  }
  for (int m = 0; m < n; m++) {
    uint64_t* q = result_row(w, d[m]);
    for (int l = 0; l < 32; l++) {
      uint16_t x[2];
      for (int k = 0; k < 2; k++) {
        int r = l >> 2, c = (l & 3) * 2 + k;
        if (i.flag) std::swap(r, c);
        memcpy(&x[k], p[m * 8 + r] + c * 2, 2);
      }
      q[l] = x[0] | (uint32_t)x[1] << 16;
    }
  }
  if (w.launch->options.statistics)
    w.count_access(ad, n == 4 ? ~0u : (1u << (8 * n)) - 1, 16, true, false);
  (void)mask;
}
static void hStmatrix(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* a = row(w, i.operands[0]);
  int n = i.vector_size;
  uint64_t ad[32];
  uint8_t* p[32];
  const Operand* d = i.operands[1].kind == OperandKind::kVector ? &i.elements[i.operands[1].first]
                                                                : &i.operands[1];
  for (int l = 0; l < 8 * n; l++) {
    ad[l] = a[l] + i.operands[0].offset;
    p[l] = w.resolve(i, l, ad[l], 16, i.space, Access::kWrite);
  }
  for (int m = 0; m < n; m++) {
    const uint64_t* q = row(w, d[m]);
    for (int l = 0; l < 32; l++)
      for (int k = 0; k < 2; k++) {
        int r = l >> 2, c = (l & 3) * 2 + k;
        if (i.flag) std::swap(r, c);
        uint16_t x = (uint16_t)(q[l] >> (16 * k));
        memcpy(p[m * 8 + r] + c * 2, &x, 2);
      }
  }
  if (w.launch->options.statistics)
    w.count_access(ad, n == 4 ? ~0u : (1u << (8 * n)) - 1, 16, true, true);
  (void)mask;
}
// ---------------------------------------------------------------- decode
bool decode_memory(const ParsedInstruction& p, Instruction& i) {
  const std::string& op = p.opcode;
  Type t = i.type;
  for (auto& m : p.modifiers) {
    if (m == "global")
      i.space = Space::kGlobal;
    else if (m.rfind("shared", 0) == 0)
      i.space = Space::kShared;
    else if (m == "local")
      i.space = Space::kLocal;
    else if (m == "const")
      i.space = Space::kConst;
    else if (m.rfind("param", 0) == 0)
      i.space = Space::kParam;
  }
  if (op == "ld" || op == "ldu" || op == "st") {
    if (p.has("async") || p.has("bulk")) return false;
    bool st = op == "st";
    Operand& d = i.operands[st ? 1 : 0];
    i.vector_size = d.kind == OperandKind::kVector ? d.count : 1;
    i.element_size = size_of(t);
    if (t == Type::kB128) {
      std::vector<Operand> v;
      std::vector<Operand> in;
      if (d.kind == OperandKind::kVector)
        in.assign(i.elements.begin() + d.first, i.elements.begin() + d.first + d.count);
      else
        in.push_back(d);
      for (auto& x : in) {
        Operand y = x;
        y.width = 8;
        v.push_back(y);
        if (x.kind != OperandKind::kSink) y.index++;
        v.push_back(y);
      }
      d.kind = OperandKind::kVector;
      d.first = (uint16_t)i.elements.size();
      d.count = (uint16_t)v.size();
      i.vector_size = (uint8_t)v.size();
      i.elements.insert(i.elements.end(), v.begin(), v.end());
      i.type = Type::kB64;
      i.element_size = 8;
    }
    if (i.space == Space::kParam) {
      const ParsedOperand& b = p.operands[st ? 0 : 1].elements[0];
      i.call_param = b.kind == OperandKind::kSymbol && !b.symbol->is_extern;
    }
    i.execute = st ? hSt : hLd;
    return i.element_size > 0;
  }
  if (op == "atom" || op == "red") {
    if (p.has("async")) return false;
    static const char* n[] = {"add", "min", "max", "inc", "dec", "cas", "exch", "and", "or", "xor"};
    bool f = false;
    for (int k = 0; k < 10; k++)
      if (p.has(n[k])) {
        i.reduction = static_cast<Reduction>(k);
        f = true;
      }
    if (!f) return false;
    i.flag = op == "red";
    i.element_size = size_of(t);
    int di = i.flag ? 1 : 2;
    i.vector_size = i.operands[di].kind == OperandKind::kVector ? i.operands[di].count : 1;
    if (t == Type::kB128) {
      i.execute = hAtom128;
      return !i.flag;
    }
    i.execute = hAtom;
    return i.element_size > 0;
  }
  if (op == "cvta") {
    i.flag = p.has("to");
    i.execute = hCvta;
    return true;
  }
  if (op == "isspacep") {
    i.flag = p.has("shared::cluster");
    i.execute = hIsspacep;
    return true;
  }
  if (op == "mapa") {
    i.execute = hMapa;
    return true;
  }
  if (op == "getctarank") {
    i.execute = hGetctarank;
    return true;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    bool st = op[0] == 's';
    i.flag = p.has("trans");
    if (!p.has("m8n8") || !p.has("b16")) return false;
    i.vector_size = p.has("x4") ? 4 : p.has("x2") ? 2 : 1;
    i.control = Control::kWarpSync;
    i.aligned = true;
    i.execute = st ? hStmatrix : hLdmatrix;
    return true;
  }
  if (op == "cp") {
    if (p.has("bulk")) {
      if (p.has("commit_group")) {
        i.execute = hBulkCommit;
        return true;
      }
      if (p.has("wait_group")) {
        i.immediate = (int)p.operands[0].integer;
        i.flag = p.has("read");
        i.execute = hBulkWait;
        return true;
      }
      if (p.has("prefetch")) {
        i.execute = hNop;
        return true;
      }
      i.flag = p.has("tensor");
      i.second_flag = p.has("reduce");
      if (i.second_flag) {
        static const char* n[] = {"add", "min", "max", "inc", "dec", "", "", "and", "or", "xor"};
        for (int k = 0; k < 10; k++)
          if (n[k][0] && p.has(n[k])) i.reduction = static_cast<Reduction>(k);
      }
      i.multicast = p.has("multicast::cluster");
      int gi = -1, si = -1;
      for (int k = 0; k < (int)p.modifiers.size(); k++) {
        if (p.modifiers[k] == "global" && gi < 0) gi = k;
        if (p.modifiers[k].rfind("shared", 0) == 0 && si < 0) si = k;
      }
      if (p.has_prefix("im2col")) return false;
      i.variant = gi < 0 ? 2 : gi < si ? 1 : 0;
      for (int r = 1; r <= 5; r++)
        if (p.has((std::to_string(r) + "d").c_str())) i.immediate = r;
      i.space = Space::kShared;
      i.execute = hBulk;
      return true;
    }
    if (!p.has("async")) return false;
    if (p.has("commit_group")) {
      i.execute = hCpCommit;
      return true;
    }
    if (p.has("wait_group")) {
      i.immediate = (int)p.operands[0].integer;
      i.execute = hCpWait;
      return true;
    }
    if (p.has("wait_all")) {
      i.flag = true;
      i.execute = hCpWait;
      return true;
    }
    if (p.has("mbarrier")) {
      i.variant = M_CPARRIVE;
      i.immediate = 0;
      i.flag = p.has("noinc");
      i.execute = hMbar;
      return true;
    }
    i.immediate = (int)p.operands[2].integer;
    if (i.immediate != 4 && i.immediate != 8 && i.immediate != 16) return false;
    if (i.num_operands > 3 && p.has_prefix("L2::cache_hint") && p.operands.size() == 4)
      i.num_operands = 3;
    i.execute = hCpAsync;
    return true;
  }
  if (op == "mbarrier") {
    int mi = -1;
    for (int k = 0; k < (int)p.operands.size(); k++)
      if (p.operands[k].kind == OperandKind::kAddress) {
        mi = k;
        break;
      }
    i.immediate = mi;
    i.execute = hMbar;
    bool tx = p.has("expect_tx");
    if (p.has("init"))
      i.variant = M_INIT;
    else if (p.has("inval"))
      i.variant = M_INVAL;
    else if (p.has("arrive_drop"))
      i.variant = tx ? M_DROP_TX : M_DROP;
    else if (p.has("arrive"))
      i.variant = tx ? M_ARRIVE_TX : p.has("noComplete") ? M_NOCOMPLETE : M_ARRIVE;
    else if (tx)
      i.variant = M_EXPECT;
    else if (p.has("complete_tx"))
      i.variant = M_COMPLETE;
    else if (p.has("test_wait") || p.has("try_wait")) {
      i.variant = M_TEST;
      i.flag = p.has("parity");
      i.control = Control::kTryWait;
    } else if (p.has("pending_count")) {
      i.execute = hMbPending;
      return true;
    } else
      return false;
    return mi >= 0;
  }
  if (op == "fence" || op == "membar") {
    i.execute = hFenceP;
    return true;
  }
  if (op == "tensormap") {
    if (p.has("cp_fenceproxy")) {
      i.control = Control::kWarpSync;
      i.aligned = true;
      i.execute = hTmCp;
      return true;
    }
    static const char* n[] = {"global_address", "rank",           "box_dim",  "global_dim",
                              "global_stride",  "element_stride", "elemtype", "interleave_layout",
                              "swizzle_mode",   "fill_mode"};
    for (int k = 0; k < 10; k++)
      if (p.has(n[k])) {
        i.variant = k;
        i.execute = hTmReplace;
        if (i.space == Space::kGlobal) i.space = Space::kGeneric;
        return true;
      }
    return false;
  }
  return false;
}
}  // namespace mergeme::ptx
