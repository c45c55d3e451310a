// core.cpp - module placement, decoding, control flow, barriers, scheduling, C interface.
#include <cxxabi.h>
#include <cstdarg>
#include <sstream>
#include "csrc/ptx/interpreter.h"
#include "csrc/ptx/vm.h"
void drainAsync(Warp& w, int l);
static bool has(const PInst& p, const char* m) {
  for (auto& x : p.mods)
    if (x == m) return true;
  return false;
}
static std::string demangle(const std::string& n) {
  int st;
  char* d = abi::__cxa_demangle(n.c_str(), 0, 0, &st);
  std::string r = st == 0 && d ? d : n;
  free(d);
  return r;
}

// ---------------------------------------------------------------- module
void Module::addRange(u64 lo, u64 n, bool ro, u8 sp, const std::string& name) {
  Range r{lo, lo + n, ro, sp, name};
  ranges.insert(std::upper_bound(ranges.begin(), ranges.end(), r,
                                 [](const Range& a, const Range& b) { return a.lo < b.lo; }),
                r);
}
static void* alignedMem(u64 n) {
  void* p = nullptr;
  if (posix_memalign(&p, 1024, std::max<u64>(n, 64))) throw VMError("out of memory");
  memset(p, 0, std::max<u64>(n, 64));
  return p;
}
void Module::place() {
  std::vector<Sym*> all(pm.symOrder);
  for (Func* f : pm.funcOrder)
    for (auto& s : f->locals)
      if (s->space == SP_GLOBAL || s->space == SP_CONST) all.push_back(s.get());
  for (Func* f : pm.funcOrder) funcTable.push_back(f);
  for (Sym* s : all)
    if (s->space == SP_GLOBAL || s->space == SP_CONST) {
      u8* p = (u8*)alignedMem(s->size);
      mem.push_back(p);
      s->addr = (u64)p;
      s->placed = true;
      if (!s->init.empty()) memcpy(p, s->init.data(), s->init.size());
      addRange(s->addr, std::max<u64>(s->size, 1), s->space == SP_CONST, s->space,
               "variable " + s->name);
    }
  for (Sym* s : all)
    for (auto& r : s->relocs) {
      u64 v = 0;
      auto i = pm.syms.find(r.sym);
      if (i != pm.syms.end() && i->second->placed)
        v = i->second->addr + r.add;
      else
        for (size_t k = 0; k < funcTable.size(); k++)
          if (funcTable[k]->name == r.sym) v = 0xF0000000ull + k;
      memcpy((u8*)s->addr + r.off, &v, 8);
    }
}
Func* Module::find(const std::string& n) {
  Func* hit = nullptr;
  std::vector<Func*> c;
  for (Func* f : pm.funcOrder)
    if (f->entry && f->body) {
      if (f->name == n || demangle(f->name) == n) return f;
      if (f->name.find(n) != std::string::npos || demangle(f->name).find(n) != std::string::npos)
        c.push_back(f);
    }
  if (c.empty()) {
    std::string m = "no kernel matches '" + n + "'; kernels:";
    for (Func* f : pm.funcOrder)
      if (f->entry) m += "\n  " + f->name;
    throw VMError(m);
  }
  if (c.size() > 1) {
    std::vector<Func*> d;
    for (Func* f : c) {
      std::string q = demangle(f->name);
      size_t p = q.find(n);
      if (p != std::string::npos &&
          (p + n.size() == q.size() || q[p + n.size()] == '(' || q[p + n.size()] == '<') &&
          (p == 0 || !(isalnum((unsigned char)q[p - 1]) || q[p - 1] == '_')))
        d.push_back(f);
    }
    if (d.size() == 1) return d[0];
    std::string m = "several kernels match '" + n + "':";
    for (Func* f : c) m += "\n  " + demangle(f->name);
    throw VMError(m);
  }
  hit = c[0];
  return hit;
}
static int immRow(Func* f, u64 v) {
  auto i = f->immMap.find(v);
  if (i != f->immMap.end()) return i->second;
  int r = (int)f->imm.size();
  f->imm.push_back(v);
  f->immMap[v] = r;
  return r;
}
struct Dec {
  Module& M;
  Func* f;
  const PInst& p;
  Inst& i;
  bool in128 = false;
  [[noreturn]] void bad(const std::string& m) {
    throw VMError("kernel " + f->name + ", PTX line " + std::to_string(p.line) + ": " + m + ": " +
                  p.text);
  }
  u64 symValue(Sym* s, s64 off) {
    if (s->space == SP_SHARED && !s->placed) {
      if (s->ext || s->size == 0) {
        f->usesExtShared = true;
        throw std::make_pair(s, off);
      }
    }
    return s->addr + off + (s->space == SP_SHARED ? SHB : s->space == SP_LOCAL ? LOCB : 0);
  }
  u64 immVal(const POp& o, Ty t) {
    if (o.isflt) {
      if (t == F32 || t == TF32) {
        if (o.fbits == 32) return o.ival;
        return bitc<u32>((float)o.dval);
      }
      if (t == F64) {
        if (o.fbits == 64) return o.ival;
        return bitc<u64>(o.dval);
      }
      if (t == F16 || t == BF16) return encF(o.dval, t, RN, false);
      if (o.fbits) return o.ival;
      return bitc<u32>((float)o.dval);
    }
    if (t == F32 && !o.isflt && o.name.empty()) {
      return o.ival;
    }
    return o.ival;
  }
  Opnd mk(const POp& o, Ty t) {
    Opnd r;
    r.kind = o.k;
    r.neg = o.neg;
    switch (o.k) {
      case O_REG:
        r.idx = o.idx + 2;
        r.w = (u8)f->regWidth[o.idx];
        break;
      case O_PRED:
        r.idx = o.idx;
        r.w = 4;
        break;
      case O_SINK:
        r.idx = 0;
        r.w = 8;
        break;
      case O_IMM:
        r.bank = 1;
        r.idx = immRow(f, immVal(o, t));
        break;
      case O_SREG:
        r.bank = 2;
        r.idx = o.idx;
        break;
      case O_SYM: {
        Sym* s = o.sym;
        r.bank = 1;
        if (s->space == SP_LOCAL) r.localRel = true;
        u64 v = 0;
        if (s->space == SP_PARAM && s->placed && p.op == "mov" && f->entry && s->ext)
          v = s->addr + o.off;
        else
          v = symValue(s, o.off);
        r.idx = immRow(f, v);
        break;
      }
      case O_NAME: {
        for (size_t k = 0; k < M.funcTable.size(); k++)
          if (M.funcTable[k]->name == o.name) {
            r.bank = 1;
            r.idx = immRow(f, 0xF0000000ull + k);
            return r;
          }
        auto si = M.pm.syms.find(o.name);
        if (si != M.pm.syms.end()) {
          POp q = o;
          q.k = O_SYM;
          q.sym = si->second.get();
          return mk(q, t);
        }
        bad("unknown name " + o.name);
      }
      case O_VEC: {
        std::vector<Opnd> v;
        for (auto& s : o.sub) v.push_back(mk(s, t));
        r.vs = (u16)i.vec.size();
        r.vn = (u16)v.size();
        i.vec.insert(i.vec.end(), v.begin(), v.end());
        break;
      }
      case O_MEM: {
        Opnd b = mk(o.sub[0], U64);
        b.kind = O_MEM;
        b.off = (s64)o.off;
        if (o.sub.size() > 1 && o.sub[1].k == O_VEC) {
          Opnd v = mk(o.sub[1], U32);
          b.vs = v.vs;
          b.vn = v.vn;
        }
        return b;
      }
      default:
        bad("operand");
    }
    return r;
  }
  void run() {
    i.src = &p;
    i.func = f;
    i.guard = p.hasGuard ? p.guard : -1;
    i.gneg = p.gneg;
    for (auto& m : p.mods) {
      Ty t = tyParse(m);
      if (t != T_NONE) i.ty = t;
      if (m == "ftz")
        i.ftz = true;
      else if (m == "sat")
        i.sat = true;
      else if (m == "relu")
        i.relu = true;
      else if (m == "NaN")
        i.nan = true;
      else if (m == "xorsign")
        i.xorsign = true;
      else if (m == "abs")
        i.abs = true;
      else if (m == "rn")
        i.rnd = RN;
      else if (m == "rz")
        i.rnd = RZ;
      else if (m == "rm")
        i.rnd = RM;
      else if (m == "rp")
        i.rnd = RP;
      else if (m == "rni")
        i.rnd = R_RNI;
      else if (m == "rzi")
        i.rnd = R_RZI;
      else if (m == "rmi")
        i.rnd = R_RMI;
      else if (m == "rpi")
        i.rnd = R_RPI;
    }
    std::string name = p.op;
    for (auto& m : p.mods) {
      if (m == "global" || m == "shared" || m.rfind("shared::", 0) == 0 || m == "local" ||
          m == "param" || m == "const" || m == "sync" || m == "async" || m == "bulk" ||
          m == "tensor" || m == "mma_async" || m == "arrive" || m == "try_wait" ||
          m == "wait_group" || m == "commit_group" || m == "wide")
        name += "." + m;
    }
    auto oi = M.opIds.find(name);
    if (oi == M.opIds.end()) {
      i.opId = (int)M.opNames.size();
      M.opIds[name] = i.opId;
      M.opNames.push_back(name);
    } else
      i.opId = oi->second;
    const std::string& op = p.op;
    if (op == "bra") {
      i.ctl = C_BRA;
      i.target = f->findLabel(p.ops[0].name, p.scope);
      if (i.target < 0) bad("unknown label");
      return;
    }
    if (op == "brx") {
      i.ctl = C_BRX;
      i.o[0] = mk(p.ops[0], U32);
      i.no = 1;
      auto t = f->targets.find(p.ops[1].name);
      if (t == f->targets.end()) bad("unknown branch targets");
      for (auto& l : t->second) {
        int x = f->findLabel(l, p.scope);
        if (x < 0) bad("unknown label " + l);
        i.targets.push_back(x);
      }
      return;
    }
    if (op == "ret") {
      i.ctl = C_RET;
      return;
    }
    if (op == "exit") {
      i.ctl = C_EXIT;
      return;
    }
    if (op == "trap") {
      i.fn = [](Warp& w, const Inst& i, u32 m) {
        w.fail(i, __builtin_ctz(m),
               w.L->printed.empty() ? "trap executed" : "trap executed after: " + w.L->printed);
      };
      return;
    }
    if (op == "call") {
      i.ctl = C_CALL;
      f->hasCalls = true;
      if (p.ops[0].k == O_NAME) {
        auto c = M.pm.funcs.find(p.ops[0].name);
        if (c == M.pm.funcs.end()) bad("call of unknown function");
        i.callee = c->second.get();
      } else
        i.o[0] = mk(p.ops[0], U64);
      auto add = [&](const std::vector<POp>& v) {
        for (auto& o : v) {
          if (o.k == O_SYM && o.sym->space == SP_PARAM) {
            Opnd q;
            q.kind = O_SYM;
            q.idx = (int)o.sym->addr;
            q.off = (s64)o.sym->size;
            i.vec.push_back(q);
          } else
            i.vec.push_back(mk(o, B64));
        }
      };
      add(p.callRets);
      i.imm = (int)i.vec.size();
      add(p.callArgs);
      return;
    }
    if (op == "nanosleep") {
      i.ctl = C_YIELD;
      i.fn = [](Warp&, const Inst&, u32) {};
      return;
    }
    i.no = (int)p.ops.size();
    if (i.no > 6 && op != "wgmma" && op != "cp") bad("too many operands");
    if (i.no > 6) i.no = 6;
    if (op == "mov" && p.ops.size() == 2 && p.ops[1].k == O_NAME) {
    }
    for (int k = 0; k < i.no; k++) i.o[k] = mk(p.ops[k], i.ty);
    if (p.hasDual) {
      i.hasDual = true;
      i.dual = mk(p.dual, i.ty);
    }
    if ((op == "bar" || op == "barrier") && !has(p, "warp")) {
      if (has(p, "cluster")) {
        i.ctl = C_BARCL;
        i.flag = has(p, "wait");
        i.aligned = has(p, "aligned");
        return;
      }
      i.ctl = C_BAR;
      i.aligned = op == "bar" || has(p, "aligned");
      i.mode = has(p, "arrive") ? 1 : has(p, "red") ? 2 : 0;
      if (i.mode == 2) i.cmp = has(p, "popc") ? 0 : has(p, "and") ? 1 : 2;
      return;
    }
    if (op == "alloca" || op == "stacksave" || op == "stackrestore" || op == "tex" ||
        op == "tld4" || op == "suld" || op == "sust")
      bad("unsupported instruction");
    if (decodeWarp(M, f, i, p) && i.fn) return;
    i.ctl = C_NONE;
    if (decodeMem(M, f, i, p) && i.fn) return;
    i.ctl = C_NONE;
    if (decodeAlu(M, f, i, p) && i.fn) {
      return;
    }
    i.fn = nullptr;  // reported when reached: a module may hold kernels for other targets
    i.fn = [](Warp& w, const Inst& i, u32 m) {
      w.fail(i, m ? __builtin_ctz(m) : -1, "unknown or unsupported instruction");
    };
  }
};
void Module::decode(Func* f) {
  if (f->decoded) return;
  f->decoded = true;
  // place the shared variables this function mentions
  u64& tot = f->entry ? f->sharedStatic : funcShared;
  std::vector<Sym*> ss, here;
  for (auto& c : f->code) {
    std::function<void(const POp&)> v = [&](const POp& o) {
      if (o.sym && o.sym->space == SP_SHARED) ss.push_back(o.sym);
      for (auto& s : o.sub) v(s);
    };
    for (auto& o : c.ops) v(o);
    for (auto& o : c.callArgs) v(o);
  }
  for (auto& s : f->locals)
    if (s->space == SP_SHARED && !s->ext) ss.push_back(s.get());
  for (Sym* s : ss) {
    if (s->placed && f->entry == false) continue;
    if (s->ext || s->size == 0) continue;
    if (s->placed) continue;
    tot = (tot + s->align - 1) / s->align * s->align;
    s->addr = tot;
    s->placed = true;
    here.push_back(s);
    tot += s->size;
  }
  for (Sym* s : ss) {
    if (s->placed)
      f->sharedStatic = std::max(f->sharedStatic, s->addr + s->size);
    else
      f->usesExtShared = true;
  }
  std::vector<int> extAlign;
  u64 al = 16;
  for (Sym* s : ss)
    if (s->ext || s->size == 0) al = std::max<u64>(al, s->align);
  u64 dyn = (f->sharedStatic + al - 1) / al * al;
  std::vector<Sym*> tmp;
  for (Sym* s : ss)
    if ((s->ext || s->size == 0)) {
      s->addr = dyn;
      s->placed = true;
      tmp.push_back(s);
    }
  if (f->usesExtShared || !tmp.empty()) {
    f->usesExtShared = true;
    f->sharedStatic = dyn;
  }
  code.push_back(std::make_unique<Inst[]>(f->code.size() + 1));
  f->dec = code.back().get();
  f->ndec = f->code.size();
  immRow(f, 0);
  for (size_t k = 0; k < f->code.size(); k++) {
    Dec d{*this, f, f->code[k], f->dec[k]};
    d.run();
  }
  static PInst endI;
  endI.text = "<end of function>";
  endI.op = "ret";
  f->dec[f->ndec].ctl = C_RET;
  f->dec[f->ndec].src = &endI;
  f->dec[f->ndec].func = f;
  for (Sym* s : tmp) s->placed = false;
  if (f->entry)
    for (Sym* s : here) s->placed = false;  // the next kernel lays out its own window
  f->immPool = (u64*)alignedMem(f->imm.size() * 256);
  mem.push_back((u8*)f->immPool);
  for (size_t k = 0; k < f->imm.size(); k++)
    for (int l = 0; l < 32; l++) f->immPool[k * 32 + l] = f->imm[k];
}
// ---------------------------------------------------------------- errors
static std::string where(Warp& w, const Inst& i, int lane) {
  Block& b = *w.blk;
  Cfg& c = w.L->c;
  std::ostringstream o;
  o << "kernel " << demangle(w.L->k->name) << ", block (" << b.cta[0] << "," << b.cta[1] << ","
    << b.cta[2] << ")";
  if (lane >= 0) {
    int t = w.id * 32 + lane;
    o << ", thread (" << t % c.block[0] << "," << t / c.block[0] % c.block[1] << ","
      << t / (c.block[0] * c.block[1]) << ")";
  } else
    o << ", warp " << w.id;
  o << ", PTX line " << i.src->line;
  if (i.src->srcline) {
    auto f = w.L->M->pm.files.find(i.src->srcfile);
    o << ", source "
      << (f == w.L->M->pm.files.end() ? "?" : f->second.substr(f->second.find_last_of('/') + 1))
      << ":" << i.src->srcline;
  }
  o << ": " << i.src->text;
  return o.str();
}
void Warp::fail(const Inst& i, int lane, const std::string& m) {
  throw VMError(m + "\n  at " + where(*this, i, lane));
}
// ---------------------------------------------------------------- warp execution
void Warp::setFrame() {
  Frame& f = *st.back();
  base[0] = f.regs.data();
  base[1] = f.f->immPool;
  base[2] = sregs.data();
  preds = f.preds.data();
  frameLocal = f.localBase;
}
void Warp::regroup() {
  Frame& f = *st.back();
  if (have) LANES(f.pc[l] = pc;);
  have = false;
  u32 run = f.mask & ~f.waiting;
  if (!run) {
    mask = 0;
    return;
  }
  u32 mn = ~0u;
  bool av = false;
  {
    u32 m2 = run;
    u32 alt = ~0u;
    for (; m2; m2 &= m2 - 1) {
      u32 q = f.pc[__builtin_ctz(m2)];
      mn = std::min(mn, q);
      if (avoid != ~0u && q > avoid) alt = std::min(alt, q);
    }
    if (avoid != ~0u && mn <= avoid && alt != ~0u) {
      mn = alt;
      av = true;
    }
  }
  u32 m = 0;
  limit = ~0u;
  for (u32 r = run; r; r &= r - 1) {
    int l = __builtin_ctz(r);
    if (f.pc[l] == mn)
      m |= 1u << l;
    else if (!av || f.pc[l] > mn)
      limit = std::min(limit, f.pc[l]);
  }
  avoid = ~0u;
  mask = m;
  pc = mn;
  have = true;
  steps = 0;
}
void Warp::doExit(u32 m) {
  Frame& f = *st.back();
  for (u32 r = m; r; r &= r - 1) drainAsync(*this, __builtin_ctz(r));
  alive &= ~m;
  for (auto& fr : st) {
    fr->mask &= ~m;
  }
  u32 back = f.waiting & ~f.barw;
  f.waiting &= ~back;
  f.waiting &= ~m;  // warp-level waiters look again
  mask &= ~m;
  have = mask != 0;
  L->progress++;
  if (st.size() > 1 && f.mask == 0) doRet(0);
}
void Warp::doRet(u32 m) {
  Frame& f = *st.back();
  f.mask &= ~m;
  mask &= ~m;
  if (st.size() == 1) {
    doExit(m);
    return;
  }
  if (f.mask) {
    have = mask != 0;
    return;
  }
  // all lanes are back: copy return values
  std::unique_ptr<Frame> done = std::move(st.back());
  st.pop_back();
  Frame& c = *st.back();
  const Inst& ci = *done->call;
  u64 per = c.param.size() / 32, cper = done->param.size() / 32;
  for (int k = 0; k < ci.imm && k < (int)done->f->rets.size(); k++) {
    auto& r = done->f->rets[k];
    const Opnd& o = ci.vec[k];
    for (int l = 0; l < 32; l++)
      if (((done->callMask & c.mask) >> l) & 1) {
        if (o.kind == O_SYM)
          memcpy(&c.param[l * per + o.idx], &done->param[l * cper + r.off], r.size);
        else {
          u64 v = 0;
          memcpy(&v, &done->param[l * cper + r.off], std::min(8, r.size));
          c.regs[(size_t)o.idx * 32 + l] = v;
        }
      }
  }
  freeFrames.push_back(std::move(done));
  have = false;
  mask = 0;
  setFrame();
}
static std::string cstr(Warp& w, u64 a) {
  std::string s;
  auto& R = w.L->ranges;
  for (auto& r : R)
    if (a >= r.lo && a < r.hi) {
      while (a < r.hi && *(char*)a && s.size() < 500) s += *(char*)a++;
      return s;
    }
  return "?";
}
// What printf would print of these arguments: %s, %d, %u, %x, %c and %% as they are, other numbers as
// integers of eight bytes.
static std::string formatted(Warp& w, int lane, const std::string& format, u64 arguments) {
  std::string out;
  u64 at = 0;
  const auto next = [&](u64 bytes) {
    at = (at + bytes - 1) / bytes * bytes;
    u64 value = 0, from = arguments + at;
    at += bytes;
    // The list lies in the thread's local memory, at a generic address.
    const u64 offset = from - (u64)w.localBuf - (u64)lane * w.localSize;
    if (w.localSize >= bytes && offset <= w.localSize - bytes)
      memcpy(&value, (const void*)from, bytes);
    return value;
  };
  for (size_t k = 0; k < format.size(); k++) {
    if (format[k] != '%') {
      out += format[k];
      continue;
    }
    bool wide = false;
    for (k++; k < format.size() && (isdigit((unsigned char)format[k]) || format[k] == 'l'); k++)
      wide = wide || format[k] == 'l';
    const char kind = k < format.size() ? format[k] : '%';
    if (kind == '%')
      out += '%';
    else if (kind == 's')
      out += cstr(w, next(8));
    else if (kind == 'd' || kind == 'i')
      out += std::to_string(wide ? (s64)next(8) : (s64)(s32)next(4));
    else if (kind == 'u' || kind == 'x' || kind == 'c')
      out += std::to_string(next(wide ? 8 : 4));
    else
      out += std::to_string(next(8));
  }
  return out;
}
void Warp::doCall(const Inst& i, u32 m) {
  Frame& c = *st.back();
  Func* g = i.callee;
  if (!g) {
    const u64* a = row(*this, i.o[0]);
    u64 id = a[__builtin_ctz(m)];
    LANES(if (((m >> l) & 1) && a[l] != id)
              fail(i, l, "divergent indirect call is not supported"););
    u64 k = id - 0xF0000000ull;
    if (k >= L->M->funcTable.size())
      fail(i, __builtin_ctz(m), "indirect call of something that is not a function");
    g = L->M->funcTable[k];
  }
  u64 per = c.param.size() / 32;
  auto arg = [&](int k, int l, int sz) -> u64 {
    const Opnd& o = i.vec[i.imm + k];
    u64 v = 0;
    if (o.kind == O_SYM)
      memcpy(&v, &c.param[l * per + o.idx], sz);
    else
      v = row(*this, o)[l];
    return v;
  };
  if (!g->body) {
    int l = __builtin_ctz(m);
    if (g->name == "__assertfail")
      fail(i, l,
           "device assertion failed: " + cstr(*this, arg(0, l, 8)) + ", file " +
               cstr(*this, arg(1, l, 8)) + ", line " + std::to_string((u32)arg(2, l, 4)) +
               ", function " + cstr(*this, arg(3, l, 8)));
    if (g->name == "vprintf") {
      L->printed = formatted(*this, l, cstr(*this, arg(0, l, 8)), arg(1, l, 8));
      while (L->printed.ends_with('\n')) L->printed.pop_back();
      for (int k = 0; k < i.imm; k++)
        if (i.vec[k].kind == O_SYM)
          for (int q = 0; q < 32; q++)
            if ((m >> q) & 1) memset(&c.param[q * per + i.vec[k].idx], 0, 4);
      pc++;
      return;
    }
    fail(i, l, "call of an external function " + g->name);
  }
  if (st.size() > 60) fail(i, __builtin_ctz(m), "call depth");
  L->M->decode(g);
  LANES(c.pc[l] = pc + 1;);
  std::unique_ptr<Frame> nf;
  if (!freeFrames.empty()) {
    nf = std::move(freeFrames.back());
    freeFrames.pop_back();
  } else
    nf = std::make_unique<Frame>();
  nf->f = g;
  nf->regs.assign((size_t)(g->nregs + 4) * 32, 0x7fc07fc07fc07fc0ull);
  nf->preds.assign(g->npreds + 1, 0);
  nf->mask = m;
  nf->callMask = m;
  nf->waiting = 0;
  nf->barw = 0;
  nf->call = &i;
  nf->retPc = pc + 1;
  u64 cper = (g->paramSpace + 31) & ~15ull;
  nf->param.assign(cper * 32, 0);
  nf->localBase = (c.localBase + c.f->localSize + 15) & ~15ull;
  if (nf->localBase + g->localSize > localSize)
    fail(i, __builtin_ctz(m), "device-function stack is too small");
  for (size_t k = 0; k < g->params.size() && i.imm + k < i.vec.size(); k++) {
    auto& q = g->params[k];
    const Opnd& o = i.vec[i.imm + k];
    LANES(if (o.kind == O_SYM)
              memcpy(&nf->param[l * cper + q.off], &c.param[l * per + o.idx], q.size);
          else {
            u64 v = row(*this, o)[l];
            memcpy(&nf->param[l * cper + q.off], &v, std::min(8, q.size));
          });
  }
  for (int l = 0; l < 32; l++) nf->pc[l] = 0;
  st.push_back(std::move(nf));
  have = false;
  mask = 0;
  setFrame();
}
bool Warp::wsync(
    const Inst& i) {  // true: executed (pc advanced or groups changed); false: the lanes wait
  Frame& f = *st.back();
  if (i.aligned) {
    if (mask == ~0u && f.waiting == 0) {
      cur = &i;
      i.fn(*this, i, mask);
      pc++;
      return true;
    }
    u32 ext = mask;
    for (u32 r = f.waiting & ~f.barw; r; r &= r - 1) {
      int l = __builtin_ctz(r);
      if (f.pc[l] == pc) ext |= 1u << l;
    }
    if (ext == alive) {
      if (ext != ~0u && i.src->op != "wgmma" && i.src->op != "setmaxnreg")
        fail(i, __builtin_ctz(ext),
             "a whole-warp instruction was executed by a warp with missing or exited threads");
      if (ext != ~0u) fail(i, -1, "a whole-warp instruction was executed by a partial warp");
      f.waiting &= ~ext;
      mask = ext;
      cur = &i;
      i.fn(*this, i, mask);
      pc++;
      avoid = ~0u;
      regroup();
      return true;
    }
    LANES(f.pc[l] = pc;);
    f.waiting |= mask;
    have = false;
    return false;
  }
  u32 ext = mask;
  for (u32 r = f.waiting & ~f.barw; r; r &= r - 1) {
    int l = __builtin_ctz(r);
    if (f.pc[l] == pc) ext |= 1u << l;
  }
  const Opnd& mo = i.o[i.mmop];
  const u64* mr = row(*this, mo);
  u32 left = ext, ran = 0;
  while (left) {
    int l0 = __builtin_ctz(left);
    u32 M = (u32)mr[l0], grp = 0;
    for (u32 r = left; r; r &= r - 1) {
      int l = __builtin_ctz(r);
      if ((u32)mr[l] == M) grp |= 1u << l;
    }
    left &= ~grp;
    if (!((M >> l0) & 1) || (grp & ~M))
      fail(
          i, __builtin_ctz(grp & ~M ? grp & ~M : 1u << l0),
          "a thread executes a .sync instruction whose member mask (" +
              [&] {
                char b[16];
                snprintf(b, 16, "0x%08x", M);
                return std::string(b);
              }() +
              ") does not contain it");
    u32 need = M & alive;
    if ((need & grp) == need) {
      cur = &i;
      i.fn(*this, i, grp);
      ran |= grp;
    }
  }
  if (ran == mask && ext == mask) {
    pc++;
    return true;
  }
  u32 at = pc;
  LANES(f.pc[l] = pc;);
  have = false;
  for (u32 r = ran; r; r &= r - 1) f.pc[__builtin_ctz(r)] = at + 1;
  f.waiting = (f.waiting & ~ran) | (ext & ~ran);
  regroup();
  return ran != 0 || mask != 0;
}
static void barRelease(Block& b, Barrier& br, bool full) {
  if (!br.reds.empty()) {
    for (auto& [w, ip, m] : br.reds) {
      const Inst& i = *ip;
      Frame& f = *w->st.back();
      if (i.cmp == 0) {
        u64* d = f.regs.data() + (size_t)i.o[0].idx * 32;
        for (u32 r = m; r; r &= r - 1) d[__builtin_ctz(r)] = (u64)br.pop;
      } else {
        bool v = i.cmp == 1 ? br.land : br.lor;
        u32& p = f.preds[i.o[0].idx];
        p = (p & ~m) | (v ? m : 0);
      }
    }
    br.reds.clear();
  }
  for (auto& [w, m] : br.waiters) {
    Frame& f = *w->st.back();
    f.waiting &= ~m;
    f.barw &= ~m;
    w->blocked = false;
  }
  br.waiters.clear();
  br.arrived = 0;
  br.expected = 0;
  br.all = false;
  br.pop = 0;
  br.land = true;
  br.lor = false;
  b.L->barriers++;
  b.L->progress++;
  if (full) b.epoch++;
}
static void barCheckAll(Block& b) {
  u32 live = 0;
  u32 nt = (u32)(b.L->c.block[0] * b.L->c.block[1] * b.L->c.block[2]);
  for (auto& w : b.warps) live += (nt & 31) && w->alive ? 32 : __builtin_popcount(w->alive);
  for (auto& br : b.bar)
    if (br.arrived && br.all && br.arrived >= live) {
      if (live < nt) b.L->exitedBar++;
      barRelease(b, br, true);
    }
}
bool Warp::barrier(const Inst& i) {
  Frame& f = *st.back();
  Block& b = *blk;
  u32 g = mask;
  if (i.aligned) {
    for (u32 r = f.waiting & ~f.barw; r; r &= r - 1) {
      int l = __builtin_ctz(r);
      if (f.pc[l] == pc) g |= 1u << l;
    }
    if (g != alive) {
      LANES(f.pc[l] = pc;);
      f.waiting |= mask;
      have = false;
      return false;
    }
    f.waiting &= ~g;
  }
  int bo = i.mode == 2 ? 1 : 0;
  u32 id = i.no > bo ? (u32)row(*this, i.o[bo])[__builtin_ctz(g)] : 0;
  if (id > 15) fail(i, __builtin_ctz(g), "barrier id " + std::to_string(id));
  int co = bo + 1;
  bool cnt = false;
  u32 count = 0;
  if (i.mode == 2) {
    if (i.no > 3) {
      cnt = true;
      count = (u32)row(*this, i.o[2])[__builtin_ctz(g)];
    }
  } else if (i.no > co) {
    cnt = true;
    count = (u32)row(*this, i.o[co])[__builtin_ctz(g)];
  }
  Barrier& br = b.bar[id];
  u32 nthr = (u32)(L->c.block[0] * L->c.block[1] * L->c.block[2]);
  if (cnt && (count % 32 || count == 0))
    fail(i, __builtin_ctz(g),
         "barrier thread count " + std::to_string(count) + " is not a multiple of the warp size");
  bool full = !cnt || count == ((nthr + 31) & ~31u);
  if (br.arrived && full && br.full) {
    if (cnt) {
      br.all = false;
      br.expected = count;
    }
    cnt = !br.all;
    count = br.expected;
  } else if (br.arrived) {
    if (br.all == cnt || (cnt && br.expected != count))
      fail(i, __builtin_ctz(g),
           "barrier " + std::to_string(id) + " is used with different thread counts at one time");
  }
  br.all = !cnt;
  br.full = full;
  br.expected = count;
  if (!full) b.complexSync = true;
  if (i.mode == 2) {
    const Opnd& po = i.o[i.no - 1];
    u32 v;
    if (po.kind == O_PRED)
      v = preds[po.idx];
    else {
      const u64* a = row(*this, po);
      v = 0;
      for (int l = 0; l < 32; l++)
        if (a[l]) v |= 1u << l;
    }
    if (po.neg) v = ~v;
    v &= g;
    br.pop += __builtin_popcount(v);
    if (v != g) br.land = false;
    if (v) br.lor = true;
    br.reds.push_back({this, &i, g});
  }
  br.arrived += i.aligned && (cnt || (nthr & 31)) ? 32 : __builtin_popcount(g);
  for (u32 r = g; r; r &= r - 1) f.pc[__builtin_ctz(r)] = pc + 1;
  have = false;
  if (i.mode != 1) {
    f.waiting |= g;
    f.barw |= g;
    br.waiters.push_back({this, g});
  }
  if (br.all)
    barCheckAll(b);
  else if (br.arrived == br.expected)
    barRelease(b, br, full);
  else if (br.arrived > br.expected)
    fail(i, __builtin_ctz(g),
         "more threads arrived at barrier " + std::to_string(id) + " than its count");
  return true;
}
static void clusterCheck(Block& b) {
  u32 live = 0, arr = 0;
  for (Block* q : *b.cluster)
    for (auto& w : q->warps) {
      live += __builtin_popcount(w->alive);
      arr += __builtin_popcount(w->clArr & w->alive);
    }
  if (arr >= live)
    for (Block* q : *b.cluster) {
      for (auto& w : q->warps) {
        w->clArr = 0;
        if (w->clWait && !w->st.empty()) {
          Frame& f = *w->st.back();
          f.waiting &= ~f.barw;
          f.barw = 0;
          w->blocked = false;
          w->clWait = false;
        }
        w->cc &= 0xffffffff;
      }
      q->clArrived++;
      q->epoch++;
      q->L->progress++;
    }
}
int Warp::run(int budget) {  // 0: budget spent, 1: blocked, 2: finished, 3: a failed wait
  setFrame();
  have = false;
  regroup();
  u64 done = 0;
  Launch& LL = *L;
  struct Acc {
    u64& d;
    u64& t;
    ~Acc() { t += d; }
  } acc{done, LL.steps};
  while (budget-- > 0) {
    if (!have) {
      if (!alive) return 2;
      if (st.back()->mask == 0 && st.size() > 1) {
        doRet(0);
      }
      regroup();
      if (!have) {
        if (!alive) return 2;
        blocked = true;
        return 1;
      }
    }
    Func* fn = st.back()->f;
    const Inst& i = fn->dec[pc];
    u32 ex = mask;
    if (i.guard >= 0) {
      u32 g = preds[i.guard];
      if (i.gneg) g = ~g;
      ex &= g;
    }
    done++;
    i.cntW++;
    i.cntL += __builtin_popcount(ex);
    if (i.ctl == C_NONE) {
      if (ex) i.fn(*this, i, ex);
      if (++pc >= limit) regroup();
      continue;
    }
    if (i.ctl == C_BRA) {
      if (ex == mask) {
        if ((u32)i.target <= pc && limit != ~0u && ++steps > 4096) {
          pc = i.target;
          avoid = pc;
          u32 hi = 0;
          Frame& f = *st.back();
          LANES(f.pc[l] = pc;);
          have = false;
          (void)hi;
          for (u32 r = f.mask & ~f.waiting; r; r &= r - 1)
            hi = std::max(hi, f.pc[__builtin_ctz(r)]);
          avoid = pc;
          regroup();
          continue;
        }
        pc = i.target;
        if (pc >= limit)
          regroup();
        else if (limit != ~0u && false)
          regroup();
        continue;
      }
      if (!ex) {
        if (++pc >= limit) regroup();
        continue;
      }
      Frame& f = *st.back();
      LANES(f.pc[l] = ((ex >> l) & 1) ? (u32)i.target : pc + 1;);
      have = false;
      int s = steps + 1;
      if (s > 4096) {
        avoid = std::min((u32)i.target, pc + 1);
        s = 0;
      }
      regroup();
      steps = s;
      continue;
    }
    if (!ex) {
      if (++pc >= limit) regroup();
      continue;
    }
    if (i.ctl == C_BRX) {
      Frame& f = *st.back();
      const u64* a = row(*this, i.o[0]);
      LANES(if ((ex >> l) & 1) {
        u32 x = (u32)a[l];
        if (x >= i.targets.size()) fail(i, l, "brx.idx index out of range");
        f.pc[l] = i.targets[x];
      } else f.pc[l] = pc + 1;);
      have = false;
      regroup();
      continue;
    }
    if (ex != mask) {
      Frame& f = *st.back();
      for (u32 r = mask & ~ex; r; r &= r - 1) f.pc[__builtin_ctz(r)] = pc + 1;
      mask = ex;
      limit = std::min(limit, pc + 1);
    }
    switch (i.ctl) {
      case C_RET:
        doRet(ex);
        if (!have) break;
        regroup();
        break;
      case C_EXIT:
        doExit(ex);
        break;
      case C_CALL:
        doCall(i, ex);
        if (have && pc >= limit) regroup();
        break;
      case C_WSYNC:
        if (wsync(i)) {
          if (have && pc >= limit) regroup();
        }
        break;
      case C_BAR:
        barrier(i);
        if (!have) {
          regroup();
        }
        break;
      case C_BARCL: {
        Frame& f = *st.back();
        u32 g = mask;
        if (i.aligned) {
          for (u32 r = f.waiting & ~f.barw; r; r &= r - 1) {
            int l = __builtin_ctz(r);
            if (f.pc[l] == pc) g |= 1u << l;
          }
          if (g != alive) {
            LANES(f.pc[l] = pc;);
            f.waiting |= mask;
            have = false;
            break;
          }
          f.waiting &= ~g;
        }
        for (u32 r = g; r; r &= r - 1) f.pc[__builtin_ctz(r)] = pc + 1;
        have = false;
        blk->complexSync = blk->cluster->size() > 1 || blk->complexSync;
        if (!i.flag) {
          if (clArr & g) fail(i, __builtin_ctz(g), "barrier.cluster.arrive twice without a wait");
          clArr |= g;
          sregs[SR_ZERO * 32 + 31] = 0;
          clTarget = blk->clArrived + 1;
          clusterCheck(*blk);
        } else {
          if (blk->clArrived < clTarget) {
            f.waiting |= g;
            f.barw |= g;
            clWait = true;
          }
        }
        regroup();
        break;
      }
      case C_WGWAIT: {  // a wgmma is one operation of four warps: it is complete when all four have
                        // issued it
        Frame& f = *st.back();
        if (ex != alive || ex != ~0u) {
          wsync(i);
          if (have && pc >= limit) regroup();
          break;
        }
        u64 need = wgSeq > (u64)i.imm ? wgSeq - i.imm : 0;
        bool ok = true;
        for (auto& q : blk->warps)
          if (q->id / 4 == id / 4 && q->alive && q->wgSeq < need) ok = false;
        if (!ok) {
          LANES(f.pc[l] = pc;);
          have = false;
          return 3;
        }
        cur = &i;
        i.fn(*this, i, ex);
        if (++pc >= limit) regroup();
        break;
      }
      case C_TRYWAIT:
        cur = &i;
        i.fn(*this, i, ex);
        pc++;
        if (waitFail) {
          Frame& f = *st.back();
          LANES(f.pc[l] = pc;);
          have = false;
          avoid = pc;
          return 3;
        }
        if (pc >= limit) regroup();
        break;
      case C_YIELD:
        pc++;
        regroup();
        return 0;
      default:
        fail(i, -1, "internal: control");
    }
    if (!alive) return 2;
  }
  if (have) {
    Frame& f = *st.back();
    LANES(f.pc[l] = pc;);
    have = false;
  }
  return 0;
}
// ---------------------------------------------------------------- launch
static std::unique_ptr<Block> newBlock(Launch& L, u64 lin, std::vector<u64>& pool,
                                       std::vector<u8>& lpool) {
  auto b = std::make_unique<Block>();
  b->L = &L;
  Cfg& c = L.c;
  b->cta[0] = (int)(lin % c.grid[0]);
  b->cta[1] = (int)(lin / c.grid[0] % c.grid[1]);
  b->cta[2] = (int)(lin / ((u64)c.grid[0] * c.grid[1]));
  b->id = (u32)lin;
  int nt = c.block[0] * c.block[1] * c.block[2], nw = (nt + 31) / 32;
  b->smemSize = L.sharedTotal;
  b->smem = (u8*)alignedMem(b->smemSize + 1024);
  static const u8 pat[4] = {0xc0, 0x7f, 0xc0, 0x7f};
  for (u64 k = 0; k < b->smemSize; k++) b->smem[k] = pat[k & 3];
  (void)pool;
  b->localPool.assign((size_t)nw * 32 * L.localPerLane + 64, 0xc0);
  for (int w = 0; w < nw; w++) {
    auto W = std::make_unique<Warp>();
    W->blk = b.get();
    W->L = &L;
    W->id = w;
    int n = std::min(32, nt - w * 32);
    W->alive = W->valid = n == 32 ? ~0u : (1u << n) - 1;
    for (int l = 0; l < 32; l++) {
      W->cpGroup[l] = 0;
      W->bulkGroup[l] = 0;
    }
    W->localSize = L.localPerLane;
    W->localBuf = L.localPerLane
                      ? b->localPool.data() + (((16 - ((u64)b->localPool.data() & 15)) & 15)) +
                            (size_t)w * 32 * L.localPerLane
                      : nullptr;
    W->sregs.assign((size_t)SR_COUNT * 32, 0);
    auto S = [&](int r, auto f) {
      for (int l = 0; l < 32; l++) W->sregs[r * 32 + l] = (u64)(u32)(f(l));
    };
    S(SR_TIDX, [&](int l) { return (w * 32 + l) % c.block[0]; });
    S(SR_TIDY, [&](int l) { return (w * 32 + l) / c.block[0] % c.block[1]; });
    S(SR_TIDZ, [&](int l) { return (w * 32 + l) / (c.block[0] * c.block[1]); });
    for (int k = 0; k < 3; k++) {
      S(SR_NTIDX + k, [&](int) { return c.block[k]; });
      S(SR_CTAX + k, [&](int) { return b->cta[k]; });
      S(SR_NCTAX + k, [&](int) { return c.grid[k]; });
      S(SR_CLX + k, [&](int) { return b->cta[k] / c.cluster[k]; });
      S(SR_NCLX + k, [&](int) { return c.grid[k] / c.cluster[k]; });
      S(SR_CCX + k, [&](int) { return b->cta[k] % c.cluster[k]; });
      S(SR_NCCX + k, [&](int) { return c.cluster[k]; });
    }
    b->rank = b->cta[0] % c.cluster[0] +
              c.cluster[0] * (b->cta[1] % c.cluster[1] + c.cluster[1] * (b->cta[2] % c.cluster[2]));
    int cs = c.cluster[0] * c.cluster[1] * c.cluster[2];
    S(SR_CCRANK, [&](int) { return b->rank; });
    S(SR_NCCRANK, [&](int) { return cs; });
    S(SR_EXPL, [&](int) { return cs > 1; });
    S(SR_LANE, [](int l) { return l; });
    S(SR_WARP, [&](int) { return w; });
    S(SR_NWARP, [&](int) { return nw; });
    S(SR_SMID, [&](int) { return (int)(lin % 132); });
    S(SR_NSMID, [](int) { return 132; });
    S(SR_LEQ, [](int l) { return 1u << l; });
    S(SR_LLE, [](int l) { return l == 31 ? ~0u : (2u << l) - 1; });
    S(SR_LLT, [](int l) { return (1u << l) - 1; });
    S(SR_LGE, [](int l) { return ~((1u << l) - 1); });
    S(SR_LGT, [](int l) { return l == 31 ? 0u : ~((2u << l) - 1); });
    S(SR_DSMEM, [&](int) { return c.smem; });
    S(SR_TSMEM, [&](int) { return (int)L.sharedTotal; });
    S(SR_ASMEM, [&](int) { return (int)L.sharedTotal; });
    auto f = std::make_unique<Frame>();
    f->f = L.k;
    if (!pool.empty()) {
      f->regs.swap(pool);
    }
    f->regs.assign((size_t)(L.k->nregs + 4) * 32, 0x7fc07fc07fc07fc0ull);
    f->preds.assign(L.k->npreds + 1, 0);
    for (int l = 0; l < 32; l++) f->pc[l] = 0;
    f->mask = W->alive;
    f->param.assign(((L.k->paramSpace + 31) & ~15ull) * 32, 0);
    W->st.push_back(std::move(f));
    b->warps.push_back(std::move(W));
  }
  b->liveWarps = nw;
  (void)lpool;
  return b;
}
static std::string describe(Launch& L) {
  std::ostringstream o;
  int n = 0;
  for (Block* b : L.resident)
    for (auto& w : b->warps)
      if (w->alive && n < 12) {
        Frame& f = *w->st.back();
        std::map<u32, u32> at;
        for (int l = 0; l < 32; l++)
          if ((f.mask >> l) & 1) at[f.pc[l]] |= 1u << l;
        for (auto& [pc, m] : at) {
          u32 q = pc;
          bool bw = (f.barw & m) == m;
          if (bw && q) q--;
          char mm[16];
          snprintf(mm, 16, "0x%08x", m);
          o << "\n  warp " << w->id << " lanes " << mm
            << (bw                ? " wait at barrier, PTX line "
                : (f.waiting & m) ? " wait for the rest of the warp, PTX line "
                                  : " at PTX line ")
            << f.f->dec[q].src->line << ": " << f.f->dec[q].src->text;
          n++;
        }
      }
  return o.str();
}
std::string Launch::run() {
  int cs = c.cluster[0] * c.cluster[1] * c.cluster[2];
  rng.seed(c.seed * 7919ull + 12345);
  rev = c.seed & 1;
  timespec t0;
  clock_gettime(CLOCK_MONOTONIC, &t0);
  auto now = [&] {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (t.tv_sec - t0.tv_sec) + (t.tv_nsec - t0.tv_nsec) * 1e-9;
  };
  // the order of blocks: clusters stay together
  std::vector<std::vector<u64>> groups;
  {
    int gx = c.grid[0] / c.cluster[0], gy = c.grid[1] / c.cluster[1], gz = c.grid[2] / c.cluster[2];
    for (int z = 0; z < gz; z++)
      for (int y = 0; y < gy; y++)
        for (int x = 0; x < gx; x++) {
          std::vector<u64> g;
          for (int a = 0; a < c.cluster[2]; a++)
            for (int b2 = 0; b2 < c.cluster[1]; b2++)
              for (int d = 0; d < c.cluster[0]; d++)
                g.push_back((u64)(x * c.cluster[0] + d) +
                            (u64)c.grid[0] * ((y * c.cluster[1] + b2) +
                                              (u64)c.grid[1] * (z * c.cluster[2] + a)));
          groups.push_back(std::move(g));
        }
  }
  if (c.order == 1)
    std::reverse(groups.begin(), groups.end());
  else if (c.order == 2)
    std::shuffle(groups.begin(), groups.end(), rng);
  size_t next = 0;
  std::vector<std::unique_ptr<Block>> live;
  std::vector<std::unique_ptr<std::vector<Block*>>> clusters;
  std::vector<u64> pool;
  std::vector<u8> lpool;
  u64 failStreak = 0, lastProg = 0;
  u64 slices = 0;
  int maxRes = std::max(1, c.resident / cs) * cs;
  struct Freer {
    std::vector<std::unique_ptr<Block>>& v;
    ~Freer() {
      for (auto& b : v) {
        free(b->smem);
        b->smem = nullptr;
      }
    }
  } freer{live};
  size_t rr = 0;
  while (next < groups.size() || !live.empty()) {
    while (next < groups.size() && (int)live.size() + cs <= maxRes) {
      auto cl = std::make_unique<std::vector<Block*>>();
      for (u64 g : groups[next]) {
        auto b = newBlock(*this, g, pool, lpool);
        b->cluster = cl.get();
        cl->push_back(b.get());
        live.push_back(std::move(b));
        nblocks++;
      }
      clusters.push_back(std::move(cl));
      next++;
      resident.clear();
      for (auto& b : live) resident.push_back(b.get());
    }
    // pick a warp
    std::vector<Warp*>& cand = candBuf;
    cand.clear();
    for (auto& b : live)
      for (auto& w : b->warps)
        if (!w->done && !w->blocked) cand.push_back(w.get());
    if (cand.empty())
      throw VMError("deadlock: no thread can go on\n  kernel " + demangle(k->name) + ", block (" +
                    std::to_string(live[0]->cta[0]) + "," + std::to_string(live[0]->cta[1]) + "," +
                    std::to_string(live[0]->cta[2]) + ")" + describe(*this));
    Warp* w;
    int budget;
    if (c.seed == 0) {
      w = cand[rr++ % cand.size()];
      budget = 100000;
    } else {
      u64 r = rng();
      w = cand[r % cand.size()];
      budget = 1 << ((r >> 32) % 15);
    }
    int st = w->run(budget);
    slices++;
    if (st == 3) {
      if (progress == lastProg) {
        if (++failStreak > 200 + 20 * cand.size())
          throw VMError(
              "deadlock: every running warp waits at an mbarrier that nobody completes\n  kernel " +
              demangle(k->name) + describe(*this));
      } else {
        failStreak = 0;
        lastProg = progress;
      }
    } else if (st != 1) {
      failStreak = 0;
      lastProg = progress;
    }
    if (st == 2) {
      w->done = true;
      Block* b = w->blk;
      b->liveWarps--;
      barCheckAll(*b);
      clusterCheck(*b);
      if (b->liveWarps == 0) b->done = true;
    } else if (st == 1 || (w->blk->bar[0].arrived))
      barCheckAll(*w->blk);
    if (w->blk->done) {
      bool all = true;
      for (Block* q : *w->blk->cluster)
        if (!q->done) all = false;
      if (all) {
        std::vector<Block*>* cl = w->blk->cluster;
        for (size_t x = 0; x < live.size();) {
          if (live[x]->cluster == cl) {
            free(live[x]->smem);
            live.erase(live.begin() + x);
          } else
            x++;
        }
        for (size_t x = 0; x < clusters.size(); x++)
          if (clusters[x].get() == cl) {
            clusters.erase(clusters.begin() + x);
            break;
          }
        resident.clear();
        for (auto& b : live) resident.push_back(b.get());
      }
    }
    if (steps > c.maxSteps)
      throw VMError("step limit reached (" + std::to_string(c.maxSteps) + " warp instructions)" +
                    describe(*this));
    if ((slices & 63) == 0 && now() > c.timeLimit)
      throw VMError("time limit reached" + describe(*this));
  }
  double el = now();
  std::ostringstream o;
  auto js = [](const std::string& s) {
    std::string r = "\"";
    for (char ch : s) {
      if (ch == '"' || ch == '\\') {
        r += '\\';
        r += ch;
      } else if ((unsigned char)ch < 32)
        r += ' ';
      else
        r += ch;
    }
    return r + "\"";
  };
  std::map<int, std::pair<u64, u64>> ops;
  for (Func* f : M->pm.funcOrder)
    if (f->decoded)
      for (size_t z = 0; z < f->ndec; z++) {
        auto& q = f->dec[z];
        if (q.cntW) {
          ops[q.opId].first += q.cntW;
          ops[q.opId].second += q.cntL;
          laneSteps += q.cntL;
        }
      }
  o << "{\"kernel\":" << js(demangle(k->name)) << ",\"seconds\":" << el << ",\"blocks\":" << nblocks
    << ",\"warp_instructions\":" << steps << ",\"lane_instructions\":" << laneSteps << ",\"ops\":{";
  bool first = true;
  for (auto& [id, v] : ops) {
    o << (first ? "" : ",") << js(M->opNames[id]) << ":[" << v.first << "," << v.second << "]";
    first = false;
  }
  o << "},\"global_load\":{\"requests\":" << gldReq << ",\"sectors\":" << gldSec
    << ",\"ideal_sectors\":" << gldIdeal << "},\"global_store\":{\"requests\":" << gstReq
    << ",\"sectors\":" << gstSec << ",\"ideal_sectors\":" << gstIdeal
    << "},\"shared\":{\"requests\":" << shReq << ",\"wavefronts\":" << shWave
    << ",\"ideal_wavefronts\":" << shIdeal << "},\"shared_bytes_per_block\":" << sharedTotal
    << ",\"global_bytes\":" << gbytes << ",\"barriers\":" << barriers << ",\"fences\":" << fences
    << ",\"shfl_undefined_reads\":" << shflUndef
    << ",\"barriers_with_exited_threads\":" << exitedBar << ",\"races\":" << nraces
    << ",\"race_examples\":[";
  for (size_t z = 0; z < races.size(); z++) o << (z ? "," : "") << js(races[z]);
  o << "]";
  if (c.flags & FL_PROFILE) {
    o << ",\"profile\":[";
    first = true;
    for (Func* f : M->pm.funcOrder)
      if (f->decoded)
        for (size_t z = 0; z < f->ndec; z++)
          if (f->dec[z].cntW) {
            o << (first ? "" : ",") << "[" << f->dec[z].src->line << "," << f->dec[z].cntW << ","
              << f->dec[z].cntL << "," << js(f->dec[z].src->text) << "]";
            first = false;
          }
    o << "]";
  }
  o << "}";
  return o.str();
}
// ---------------------------------------------------------------- C interface
namespace mergeme::ptx {

struct Module::State : ::Module {
  ~State() {
    for (u8* p : mem) free(p);
  }
};

Module::Module(const std::string& text) : state_(std::make_unique<State>()) {
  parsePtx(text, state_->pm);
  state_->place();
}
Module::~Module() = default;

std::vector<Kernel> Module::kernels() const {
  std::vector<Kernel> out;
  for (Func* f : state_->pm.funcOrder) {
    if (!f->entry) continue;
    Kernel k{f->name, demangle(f->name), f->paramBytes, {}};
    for (auto& p : f->params) k.parameters.push_back({p.off, p.size, p.align});
    out.push_back(std::move(k));
  }
  return out;
}

std::pair<uint64_t, uint64_t> Module::variable(const std::string& name) const {
  for (auto& [mangled, s] : state_->pm.syms)
    if (s->placed && (mangled == name || demangle(mangled) == name)) return {s->addr, s->size};
  return {0, 0};
}

std::string Module::launch(const std::string& kernel, const LaunchOptions& o,
                           std::span<const unsigned char> parameters, std::vector<Buffer> buffers) {
  ::Module* m = state_.get();
  Launch L;
  L.M = m;
  L.k = m->find(kernel);
  Func* f = L.k;
  for (int k = 0; k < 3; k++) {
    L.c.grid[k] = o.grid[k];
    L.c.block[k] = o.block[k];
    L.c.cluster[k] = o.cluster[k];
  }
  L.c.smem = o.shared_bytes;
  L.c.seed = o.seed;
  L.c.resident = o.resident;
  L.c.flags = (o.statistics ? FL_STATS : 0) | (o.races ? FL_RACE : 0) |
              (o.stop_at_race ? FL_RACE_ERR : 0) | (o.profile ? FL_PROFILE : 0);
  L.c.order = static_cast<s32>(o.order);
  L.c.maxSteps = o.max_steps;
  L.c.timeLimit = o.max_seconds;
  const Cfg* cfg = &L.c;
  u64 nparams = parameters.size();
  u8* pb = (u8*)alignedMem(nparams + 64);
  struct F {
    u8* p;
    ~F() { free(p); }
  } fr{pb};
  memcpy(pb, parameters.data(), nparams);
  L.params = pb;
  L.nparams = nparams;
  if (nparams != (u64)f->paramBytes && !f->params.empty())
    throw VMError("kernel " + demangle(f->name) + " takes " + std::to_string(f->paramBytes) +
                  " bytes of parameters, " + std::to_string(nparams) + " were passed");
  for (int k = 0; k < 3; k++) {
    if (cfg->grid[k] < 1 || cfg->block[k] < 1 || cfg->cluster[k] < 1)
      throw VMError("grid, block and cluster sizes must be positive");
    if (cfg->grid[k] % cfg->cluster[k]) throw VMError("grid is not a multiple of the cluster size");
  }
  s64 nt = (s64)cfg->block[0] * cfg->block[1] * cfg->block[2];
  if (nt > 1024) throw VMError("more than 1024 threads in a block");
  if (f->reqntid[0])
    for (int k = 0; k < 3; k++)
      if (f->reqntid[k] != cfg->block[k]) throw VMError("block size differs from .reqntid");
  if (f->maxntid[0] && nt > (s64)f->maxntid[0] * f->maxntid[1] * f->maxntid[2])
    throw VMError("block has more threads than .maxntid (launch bounds)");
  for (Func* g : m->pm.funcOrder)
    if (!g->entry && g->body) m->decode(g);
  if (!f->decoded) {
    f->sharedStatic = m->funcShared;
  }
  m->decode(f);
  L.sharedTotal = f->sharedStatic + cfg->smem;
  if (L.sharedTotal > 232448) throw VMError("more than 227 KiB of shared memory in a block");
  L.localPerLane = (f->localSize + 15) & ~15ull;
  bool calls = f->hasCalls;
  if (calls) L.localPerLane += 16384;
  L.stats = cfg->flags & FL_STATS;
  L.race = cfg->flags & (FL_RACE | FL_RACE_ERR);
  L.ranges = m->ranges;
  for (auto& b : buffers)
    L.ranges.push_back({b.begin, b.begin + b.bytes, b.read_only, SP_GLOBAL, b.name});
  L.ranges.push_back(
      {(u64)pb, (u64)pb + std::max<u64>(nparams, 1), true, SP_PARAM, "kernel parameters"});
  std::sort(L.ranges.begin(), L.ranges.end(),
            [](const Range& a, const Range& b) { return a.lo < b.lo; });
  for (size_t k = 1; k < L.ranges.size(); k++)
    if (L.ranges[k].lo < L.ranges[k - 1].hi)
      throw VMError("buffer " + L.ranges[k].name + " overlaps " + L.ranges[k - 1].name);
  for (Func* g : m->pm.funcOrder)
    if (g->decoded)
      for (size_t z = 0; z <= g->ndec; z++) g->dec[z].cntW = g->dec[z].cntL = 0;
  return L.run();
}

}  // namespace mergeme::ptx
