// ptx.h - data structures shared by the PTX parser and the interpreter.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

enum Ty : u8 {
  T_NONE,
  PRED,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  F16X2,
  BF16,
  BF16X2,
  F32,
  F64,
  TF32,
  E4M3,
  E5M2,
  E4M3X2,
  E5M2X2,
  U16X2,
  S16X2,
  F32X2,
  UE8M0X2,
  S4,
  U4,
  B1
};
int tySize(Ty t);
Ty tyParse(const std::string& s);  // T_NONE when not a type
inline bool tyFloat(Ty t) { return t >= F16 && t <= E5M2X2; }
inline bool tySigned(Ty t) { return t >= S8 && t <= S64; }

struct VMError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum Space : u8 { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_CONST, SP_PARAM };

struct Sym {  // a variable
  std::string name;
  Space space = SP_GLOBAL;
  Ty ty = B8;
  int align = 1;
  u64 count = 1;
  u64 size = 0;
  bool ext = false;
  std::vector<u8> init;
  struct Reloc {
    u64 off;
    std::string sym;
    s64 add;
  };
  std::vector<Reloc> relocs;
  u64 addr = 0;  // host address (global/const) or offset in its space
  bool placed = false;
};

enum OpK : u8 { O_NONE, O_REG, O_PRED, O_IMM, O_SYM, O_VEC, O_MEM, O_SINK, O_SREG, O_NAME };
struct POp {  // parsed operand
  OpK k = O_NONE;
  bool neg = false;
  int idx = -1;
  Ty rty = T_NONE;  // register index / declared type
  bool isflt = false;
  int fbits = 0;
  u64 ival = 0;
  double dval = 0;
  s64 off = 0;
  std::string name;
  Sym* sym = nullptr;
  std::vector<POp> sub;  // VEC elements; MEM: [0]=base, [1..]=extra
};
struct PInst {
  std::string op;
  std::vector<std::string> mods;  // op split at dots
  std::string full, text;
  std::vector<POp> ops;
  bool hasDual = false;
  POp dual;
  bool hasGuard = false, gneg = false;
  int guard = -1;
  int line = 0, srcfile = 0, srcline = 0, scope = 0;
  std::vector<POp> callArgs, callRets;
  std::string proto;
};
struct Param {
  std::string name;
  Ty ty;
  int size, align, off;
};
struct Inst;
struct Func {
  std::string name;
  bool entry = false, body = false;
  std::vector<Param> params, rets;
  int paramBytes = 0, retBytes = 0;
  std::vector<PInst> code;
  int nregs = 0, npreds = 0;
  std::vector<int> regWidth;  // bytes for each register row
  std::map<std::string, int> labels;
  std::vector<int> scopeParent;  // labels are keyed name@scope
  int findLabel(const std::string& n, int sc) const {
    for (; sc >= 0; sc = scopeParent[sc]) {
      auto i = labels.find(n + "@" + std::to_string(sc));
      if (i != labels.end()) return i->second;
    }
    return -1;
  }
  std::map<std::string, std::vector<std::string>> targets;
  std::vector<std::unique_ptr<Sym>>
      locals;  // function-scope variables (shared/local/param/const/global)
  u64 localSize = 0, paramSpace = 0;
  int reqntid[3] = {0, 0, 0}, maxntid[3] = {0, 0, 0};
  // decoded
  Inst* dec = nullptr;
  size_t ndec = 0;
  bool decoded = false;
  std::vector<u64> imm;
  u64* immPool = nullptr;
  u64 sharedStatic = 0;
  bool usesLocalCalls = false;
  std::unordered_map<u64, int> immMap;
  bool usesExtShared = false;
  bool hasCalls = false;
};
struct PModule {
  std::map<std::string, std::unique_ptr<Sym>> syms;
  std::vector<Sym*> symOrder;
  std::map<std::string, std::unique_ptr<Func>> funcs;
  std::vector<Func*> funcOrder;
  std::map<int, std::string> files;
  std::string target;
};
void parsePtx(const std::string& src, PModule& m);
enum SRegId {
  SR_TIDX,
  SR_TIDY,
  SR_TIDZ,
  SR_NTIDX,
  SR_NTIDY,
  SR_NTIDZ,
  SR_CTAX,
  SR_CTAY,
  SR_CTAZ,
  SR_NCTAX,
  SR_NCTAY,
  SR_NCTAZ,
  SR_LANE,
  SR_WARP,
  SR_NWARP,
  SR_SMID,
  SR_NSMID,
  SR_GRIDID,
  SR_LEQ,
  SR_LLE,
  SR_LLT,
  SR_LGE,
  SR_LGT,
  SR_DSMEM,
  SR_TSMEM,
  SR_CLX,
  SR_CLY,
  SR_CLZ,
  SR_NCLX,
  SR_NCLY,
  SR_NCLZ,
  SR_CCX,
  SR_CCY,
  SR_CCZ,
  SR_NCCX,
  SR_NCCY,
  SR_NCCZ,
  SR_CCRANK,
  SR_NCCRANK,
  SR_EXPL,
  SR_ASMEM,
  SR_ZERO,
  SR_CLOCK,
  SR_CLOCK64,
  SR_CLOCKHI,
  SR_GTIMER,
  SR_GTIMERHI,
  SR_COUNT
};
int sregId(const std::string& s);
