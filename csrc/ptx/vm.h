// vm.h - interpreter state.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <functional>
#include <random>
#include "csrc/ptx/ptx.h"

struct Warp;
struct Block;
struct Launch;
struct Inst;
typedef void (*Handler)(Warp&, const Inst&, u32);

enum Ctl : u8 {
  C_NONE,
  C_BRA,
  C_BRX,
  C_CALL,
  C_RET,
  C_EXIT,
  C_BAR,
  C_WSYNC,
  C_TRYWAIT,
  C_YIELD,
  C_BARCL,
  C_WGWAIT
};
enum Rnd : u8 { RN, RZ, RM, RP, RNA, R_RNI, R_RZI, R_RMI, R_RPI, R_NONE };
enum Cmp : u8 { EQ, NE, LT, LE, GT, GE, LO, LS, HI, HS, EQU, NEU, LTU, LEU, GTU, GEU, NUM_, NAN_ };

struct Opnd {
  u8 kind = 0, bank = 0, w = 8;
  bool neg = false, localRel = false;
  int idx = 0;
  s64 off = 0;
  u16 vs = 0, vn = 0;
};
struct Inst {
  Handler fn = nullptr;
  u8 ctl = C_NONE;
  bool gneg = false;
  int guard = -1;
  Opnd o[6];
  int no = 0;
  Opnd dual;
  bool hasDual = false;
  Ty ty = T_NONE, ty2 = T_NONE;
  u8 sp = 0, vecn = 1, cmp = 0, boolop = 0, rnd = RN, mode = 0, esz = 0;
  bool ftz = false, sat = false, relu = false, nan = false, xorsign = false, abs = false,
       flag = false, flag2 = false, carry = false, scc = false;
  int target = -1, imm = 0, mmop = -1;
  bool aligned = false;
  std::vector<Opnd> vec;
  std::vector<int> targets;
  struct Mma* mma = nullptr;
  const PInst* src = nullptr;
  Func* func = nullptr;
  Func* callee = nullptr;
  int opId = 0;
  mutable u64 cntW = 0, cntL = 0;
};
struct Mma {
  int m, n, k;
  Ty a, b, c, d;
  int nd = 0, na = 0, nb = 0, nc = 0;
  Opnd D[256], A[16], B[16], C[16];
  bool satf = false;
  bool immA = false, immB = false;
  int tA = 0, tB = 0;
};
struct Range {
  u64 lo, hi;
  bool ro;
  u8 space;
  std::string name;
};
struct CpOp {
  u32 dst;
  u64 src;
  u32 size, nsrc;
  u64 group, seq;
  int line;
};
struct BulkOp {
  Block* mblk = nullptr;
  u32 mbar = 0;
  s64 bytes = 0;
  std::function<void()> read, land;
  u64 group = 0;
  bool readDone = false, done = false;
};
struct PendArr {
  u32 mbar;
  Block* blk;
  int lane;
  Warp* w;
  size_t upto;
  bool noinc;
};
struct WgRec {
  u64 hash;
  std::vector<u32> offs;
  const Inst* i;
};

struct Frame {
  Func* f = nullptr;
  std::vector<u64> regs;
  std::vector<u32> preds;
  u32 pc[32];
  u32 mask = 0, waiting = 0, barw = 0, callMask = 0;
  std::vector<u8> param;
  u64 localBase = 0;
  const Inst* call = nullptr;
  u32 retPc = 0;
};
struct Warp {
  Block* blk;
  Launch* L;
  int id;
  u32 alive = 0, valid = 0, cc = 0;
  u64* base[3];
  u32* preds = nullptr;
  std::vector<std::unique_ptr<Frame>> st;
  std::vector<std::unique_ptr<Frame>> freeFrames;
  std::vector<u64> sregs;
  u8* localBuf = nullptr;
  u64 localSize = 0;
  u64 frameLocal = 0;
  std::vector<CpOp> cp[32];
  u64 cpGroup[32];
  u64 cpSeq = 0;
  std::vector<BulkOp*> bulk[32];
  u64 bulkGroup[32];
  u32 pc = 0, mask = 0, limit = 0;
  bool have = false;
  u32 avoid = 0xffffffffu;
  bool blocked = false, done = false;
  const Inst* cur = nullptr;
  int errLane = -1;
  bool waitFail = false, accShared = false;
  int steps = 0;
  size_t lastRange = 0;
  struct WgPend {
    u64 v[32];
    u64 seq;
  };
  std::unordered_map<u64*, WgPend> wgPend;
  u64 wgSeq = 0;
  std::vector<WgRec> wgOpen;
  std::vector<std::vector<WgRec>> wgGroups;
  bool clWait = false;
  u32 clArr = 0, clTarget = 0;
  u64 epoch = 0;  // racecheck
  int run(int budget);
  void regroup();
  void setFrame();
  u8* resolve(const Inst& i, int l, u64 addr, u32 size, int sp, int acc);
  u8* sharedPtr(const Inst& i, int l, u64 addr, u32 size, int acc);
  u8* globalPtr(const Inst& i, int l, u64 addr, u32 size, int acc);
  [[noreturn]] void fail(const Inst& i, int lane, const std::string& m);
  bool wsync(const Inst& i);
  bool barrier(const Inst& i);
  void doCall(const Inst& i, u32 m);
  void doRet(u32 m);
  void doExit(u32 m);
  void landCp(int lane, u64 groupBelow, u64 seqBelow);
  void raceCheck(const Inst& i, Block* b, u32 off, u32 size, int acc);
  void statMem(const Inst& i, const u64* a, u32 mask, u32 size, bool shared, bool store);
};
struct MBar {
  u32 pending, expected;
  s64 tx;
  u64 phase;
  u64 opaque;
};
struct Barrier {
  u32 expected = 0;
  u32 arrived = 0;
  bool all = false, full = false;
  std::vector<std::pair<Warp*, u32>> waiters;
  s64 pop = 0;
  bool land = true, lor = false;
  std::vector<std::tuple<Warp*, const Inst*, u32>> reds;
};
struct Shadow {
  u32 we = 0, re = 0;
  s16 ww = -1, rw = -1;
  u32 wi = 0, ri = 0;
};
struct Block {
  Launch* L;
  int cta[3];
  int rank = 0;
  std::vector<Block*>* cluster = nullptr;
  u8* smem = nullptr;
  u64 smemSize = 0;
  u32 id = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier bar[16];
  std::map<u32, MBar> mbars;
  int liveWarps = 0;
  std::vector<std::unique_ptr<BulkOp>> pend;
  std::vector<PendArr> pendArr;
  void demand(u32 mbarOff);
  std::vector<Shadow> shadow;
  u32 epoch = 1;
  bool complexSync = false;
  std::vector<u64> regPool;
  u32 clArrived = 0;
  bool done = false;
  std::vector<u8> localPool;
};
struct Cfg {
  s32 grid[3], block[3], cluster[3];
  u32 smem;
  u32 seed;
  s32 resident, flags, order;
  u64 maxSteps;
  double timeLimit;
};
enum { FL_STATS = 1, FL_RACE = 2, FL_RACE_ERR = 4, FL_PROFILE = 8 };

struct Module {
  PModule pm;
  std::vector<Range> ranges;
  std::vector<std::unique_ptr<Inst[]>> code;
  std::vector<std::unique_ptr<Mma>> mmas;
  std::vector<u8*> mem;
  std::vector<std::string> opNames;
  std::unordered_map<std::string, int> opIds;
  u64 funcShared = 0;
  void place();
  void decode(Func* f);
  Func* find(const std::string& n);
  void addRange(u64 lo, u64 n, bool ro, u8 sp, const std::string& name);
  std::vector<Func*> funcTable;
};
struct Launch {
  Module* M;
  Func* k;
  Cfg c;
  const u8* params;
  u64 nparams;
  u64 sharedTotal = 0, localPerLane = 0;
  bool stats = true, race = false;
  std::mt19937_64 rng;
  bool rev = false;
  u64 steps = 0, laneSteps = 0, gldReq = 0, gldSec = 0, gldIdeal = 0, gstReq = 0, gstSec = 0,
      gstIdeal = 0, shReq = 0, shWave = 0, shIdeal = 0, barriers = 0, fences = 0, shflUndef = 0,
      exitedBar = 0, nblocks = 0, progress = 0, gbytes = 0, sbytes = 0, wgHazard = 0;
  std::vector<std::string> races;
  u64 nraces = 0;
  std::vector<Range> ranges;
  std::vector<std::string> warnings;
  std::vector<Block*> resident;
  std::string printed;  // last
  std::vector<Warp*> candBuf;
  std::string run();
};
const u64 SHB = 1024;  // first byte of a block's shared window, as on sm_90
const u64 LOCB = 256;  // first local address
#define SHFULL 0xffffffffu
static inline const u64* row(const Warp& w, const Opnd& o) {
  return w.base[o.bank] + (size_t)o.idx * 32;
}
static inline u64* rowd(const Warp& w, const Opnd& o) { return w.base[0] + (size_t)o.idx * 32; }
#define LANES(...)                            \
  do {                                        \
    if (mask == 0xffffffffu) {                \
      for (int l = 0; l < 32; l++) {          \
        __VA_ARGS__                           \
      }                                       \
    } else {                                  \
      for (u32 m_ = mask; m_; m_ &= m_ - 1) { \
        int l = __builtin_ctz(m_);            \
        __VA_ARGS__                           \
      }                                       \
    }                                         \
  } while (0)
static inline u64 maskw(u64 v, int w) {
  return w >= 8 ? v : w == 4 ? (u32)v : w == 2 ? (u16)v : (u8)v;
}
template <class D, class S>
static inline D bitc(S s) {
  D d;
  static_assert(sizeof(D) == sizeof(S));
  memcpy(&d, &s, sizeof d);
  return d;
}
template <class T>
static inline T get(u64 v) {
  if constexpr (std::is_same_v<T, float>)
    return bitc<float>((u32)v);
  else if constexpr (std::is_same_v<T, double>)
    return bitc<double>(v);
  else
    return (T)v;
}
template <class T>
static inline u64 put(T v) {
  if constexpr (std::is_same_v<T, float>)
    return bitc<u32>(v);
  else if constexpr (std::is_same_v<T, double>)
    return bitc<u64>(v);
  else
    return (u64)(std::make_unsigned_t<T>)v;
}
u64 encF(double x, Ty t, int rnd, bool satfinite);
double decF(u64 b, Ty t);
static inline float h2f(u16 h) { return (float)(_Float16)bitc<_Float16>(h); }
static inline float b2f(u16 h) { return bitc<float>((u32)h << 16); }
bool decodeAlu(Module& M, Func* f, Inst& i, const PInst& p);
bool decodeMem(Module& M, Func* f, Inst& i, const PInst& p);
bool decodeWarp(Module& M, Func* f, Inst& i, const PInst& p);
std::string opText(const Inst& i);
