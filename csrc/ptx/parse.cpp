// parse.cpp - a PTX text parser producing the structures of ptx.h.
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include "csrc/ptx/ptx.h"

int tySize(Ty t) {
  switch (t) {
    case PRED:
    case B8:
    case U8:
    case S8:
    case E4M3:
    case E5M2:
    case S4:
    case U4:
    case B1:
      return 1;
    case B16:
    case U16:
    case S16:
    case F16:
    case BF16:
    case E4M3X2:
    case E5M2X2:
    case UE8M0X2:
      return 2;
    case B32:
    case U32:
    case S32:
    case F32:
    case F16X2:
    case BF16X2:
    case TF32:
    case U16X2:
    case S16X2:
      return 4;
    case B64:
    case U64:
    case S64:
    case F64:
    case F32X2:
      return 8;
    case B128:
      return 16;
    default:
      return 0;
  }
}
Ty tyParse(const std::string& s) {
  static const std::unordered_map<std::string, Ty> m = {
      {"pred", PRED},       {"b8", B8},         {"b16", B16},     {"b32", B32},
      {"b64", B64},         {"b128", B128},     {"u8", U8},       {"u16", U16},
      {"u32", U32},         {"u64", U64},       {"s8", S8},       {"s16", S16},
      {"s32", S32},         {"s64", S64},       {"f16", F16},     {"f16x2", F16X2},
      {"bf16", BF16},       {"bf16x2", BF16X2}, {"f32", F32},     {"f64", F64},
      {"tf32", TF32},       {"e4m3", E4M3},     {"e5m2", E5M2},   {"e4m3x2", E4M3X2},
      {"e5m2x2", E5M2X2},   {"u16x2", U16X2},   {"s16x2", S16X2}, {"f32x2", F32X2},
      {"ue8m0x2", UE8M0X2}, {"s4", S4},         {"u4", U4},       {"b1", B1}};
  auto i = m.find(s);
  return i == m.end() ? T_NONE : i->second;
}
int sregId(const std::string& s) {
  static const std::unordered_map<std::string, int> m = {{"%tid.x", SR_TIDX},
                                                         {"%tid.y", SR_TIDY},
                                                         {"%tid.z", SR_TIDZ},
                                                         {"%ntid.x", SR_NTIDX},
                                                         {"%ntid.y", SR_NTIDY},
                                                         {"%ntid.z", SR_NTIDZ},
                                                         {"%ctaid.x", SR_CTAX},
                                                         {"%ctaid.y", SR_CTAY},
                                                         {"%ctaid.z", SR_CTAZ},
                                                         {"%nctaid.x", SR_NCTAX},
                                                         {"%nctaid.y", SR_NCTAY},
                                                         {"%nctaid.z", SR_NCTAZ},
                                                         {"%laneid", SR_LANE},
                                                         {"%warpid", SR_WARP},
                                                         {"%nwarpid", SR_NWARP},
                                                         {"%smid", SR_SMID},
                                                         {"%nsmid", SR_NSMID},
                                                         {"%gridid", SR_GRIDID},
                                                         {"%lanemask_eq", SR_LEQ},
                                                         {"%lanemask_le", SR_LLE},
                                                         {"%lanemask_lt", SR_LLT},
                                                         {"%lanemask_ge", SR_LGE},
                                                         {"%lanemask_gt", SR_LGT},
                                                         {"%dynamic_smem_size", SR_DSMEM},
                                                         {"%total_smem_size", SR_TSMEM},
                                                         {"%aggr_smem_size", SR_ASMEM},
                                                         {"%clusterid.x", SR_CLX},
                                                         {"%clusterid.y", SR_CLY},
                                                         {"%clusterid.z", SR_CLZ},
                                                         {"%nclusterid.x", SR_NCLX},
                                                         {"%nclusterid.y", SR_NCLY},
                                                         {"%nclusterid.z", SR_NCLZ},
                                                         {"%cluster_ctaid.x", SR_CCX},
                                                         {"%cluster_ctaid.y", SR_CCY},
                                                         {"%cluster_ctaid.z", SR_CCZ},
                                                         {"%cluster_nctaid.x", SR_NCCX},
                                                         {"%cluster_nctaid.y", SR_NCCY},
                                                         {"%cluster_nctaid.z", SR_NCCZ},
                                                         {"%cluster_ctarank", SR_CCRANK},
                                                         {"%cluster_nctarank", SR_NCCRANK},
                                                         {"%is_explicit_cluster", SR_EXPL},
                                                         {"%tid.w", SR_ZERO},
                                                         {"%ctaid.w", SR_ZERO},
                                                         {"%clock", SR_CLOCK},
                                                         {"%clock64", SR_CLOCK64},
                                                         {"%clock_hi", SR_CLOCKHI},
                                                         {"%globaltimer", SR_GTIMER},
                                                         {"%globaltimer_lo", SR_GTIMER},
                                                         {"%globaltimer_hi", SR_GTIMERHI}};
  auto i = m.find(s);
  return i == m.end() ? -1 : i->second;
}

namespace {
enum TK { WORD, NUM, PUNCT, STR, END };
struct Tok {
  TK k;
  std::string s;
  int line;
  size_t pos, end;
};

struct Parser {
  const std::string& src;
  PModule& M;
  std::vector<Tok> t;
  size_t p = 0;
  Func* F = nullptr;
  struct RegRange {
    int base, n;
    Ty ty;
    bool pred;
  };
  struct Scope {
    std::unordered_map<std::string, RegRange> regs;
    std::unordered_map<std::string, RegRange> ranges;
    std::unordered_map<std::string, Sym*> syms;
    int id = 0;
  };
  std::vector<Scope> scopes;
  int curFile = 0, curLine = 0;
  Parser(const std::string& s, PModule& m) : src(s), M(m) { lex(); }

  [[noreturn]] void err(const std::string& m) {
    throw VMError("PTX parse error at line " + std::to_string(t[p].line) + ": " + m + " (near '" +
                  t[p].s + "')");
  }
  static bool wc(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.';
  }
  void lex() {
    size_t i = 0, n = src.size();
    int line = 1;
    while (i < n) {
      char c = src[i];
      if (c == '\n') {
        line++;
        i++;
        continue;
      }
      if (isspace((unsigned char)c)) {
        i++;
        continue;
      }
      if (c == '/' && i + 1 < n && src[i + 1] == '/') {
        while (i < n && src[i] != '\n') i++;
        continue;
      }
      if (c == '/' && i + 1 < n && src[i + 1] == '*') {
        i += 2;
        while (i + 1 < n && !(src[i] == '*' && src[i + 1] == '/')) {
          if (src[i] == '\n') line++;
          i++;
        }
        i += 2;
        continue;
      }
      size_t b = i;
      if (c == '"') {
        i++;
        while (i < n && src[i] != '"') {
          if (src[i] == '\\') i++;
          i++;
        }
        i++;
        t.push_back({STR, src.substr(b + 1, i - b - 2), line, b, i});
        continue;
      }
      if (isdigit((unsigned char)c)) {
        while (i < n && (isalnum((unsigned char)src[i]) || src[i] == '.')) {
          if ((src[i] == 'e' || src[i] == 'E') && src[b] != '0' && i + 1 < n &&
              (src[i + 1] == '-' || src[i + 1] == '+'))
            i++;
          i++;
        }
        t.push_back({NUM, src.substr(b, i - b), line, b, i});
        continue;
      }
      if (wc(c)) {
        while (i < n) {
          if (wc(src[i])) {
            i++;
            continue;
          }
          if (src[i] == ':' && i + 2 < n && src[i + 1] == ':' && wc(src[i + 2])) {
            i += 2;
            continue;
          }
          break;
        }
        t.push_back({WORD, src.substr(b, i - b), line, b, i});
        continue;
      }
      i++;
      t.push_back({PUNCT, std::string(1, c), line, b, i});
    }
    t.push_back({END, "<end>", line, n, n});
  }
  bool is(const char* s) const { return t[p].s == s && t[p].k != STR; }
  bool acc(const char* s) {
    if (is(s)) {
      p++;
      return true;
    }
    return false;
  }
  void need(const char* s) {
    if (!acc(s)) err(std::string("expected '") + s + "'");
  }
  std::string word() {
    if (t[p].k != WORD) err("expected a word");
    return t[p++].s;
  }

  static bool parseNum(const std::string& s, POp& o) {
    o.k = O_IMM;
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F') && s.size() == 10) {
      u32 b = (u32)strtoull(s.c_str() + 2, 0, 16);
      float f;
      memcpy(&f, &b, 4);
      o.isflt = true;
      o.fbits = 32;
      o.ival = b;
      o.dval = f;
      return true;
    }
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D') && s.size() == 18) {
      u64 b = strtoull(s.c_str() + 2, 0, 16);
      double f;
      memcpy(&f, &b, 8);
      o.isflt = true;
      o.fbits = 64;
      o.ival = b;
      o.dval = f;
      return true;
    }
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B')) {
      o.ival = strtoull(s.c_str() + 2, 0, 2);
      return true;
    }
    bool hex = s.size() > 1 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X');
    if (!hex && (s.find('.') != std::string::npos || s.find('e') != std::string::npos ||
                 s.find('E') != std::string::npos)) {
      o.isflt = true;
      o.fbits = 0;
      o.dval = strtod(s.c_str(), 0);
      return true;
    }
    o.ival = strtoull(s.c_str(), 0, 0);
    return true;
  }
  s64 constInt() {  // a small constant expression: number, -number, a+b, a*b, parentheses
    s64 v = constTerm();
    for (;;) {
      if (acc("+"))
        v += constTerm();
      else if (acc("-"))
        v -= constTerm();
      else if (acc("*"))
        v *= constTerm();
      else
        return v;
    }
  }
  s64 constTerm() {
    if (acc("-")) return -constTerm();
    if (acc("(")) {
      s64 v = constInt();
      need(")");
      return v;
    }
    if (t[p].k != NUM) err("expected a constant");
    POp o;
    parseNum(t[p++].s, o);
    return (s64)o.ival;
  }
  bool findReg(const std::string& n, POp& o) {
    for (int s = (int)scopes.size() - 1; s >= 0; s--) {
      auto i = scopes[s].regs.find(n);
      if (i != scopes[s].regs.end()) {
        o.k = i->second.pred ? O_PRED : O_REG;
        o.idx = i->second.base;
        o.rty = i->second.ty;
        o.name = n;
        return true;
      }
      size_t e = n.size();
      while (e > 0 && isdigit((unsigned char)n[e - 1])) e--;
      if (e < n.size()) {
        auto r = scopes[s].ranges.find(n.substr(0, e));
        if (r != scopes[s].ranges.end()) {
          int k = atoi(n.c_str() + e);
          if (k < r->second.n) {
            o.k = r->second.pred ? O_PRED : O_REG;
            o.idx = r->second.base + k * (r->second.ty == B128 ? 2 : 1);
            o.rty = r->second.ty;
            o.name = n;
            return true;
          }
        }
      }
    }
    return false;
  }
  Sym* findSym(const std::string& n) {
    for (int s = (int)scopes.size() - 1; s >= 0; s--) {
      auto i = scopes[s].syms.find(n);
      if (i != scopes[s].syms.end()) return i->second;
    }
    auto i = M.syms.find(n);
    return i == M.syms.end() ? nullptr : i->second.get();
  }
  POp wordOperand(const std::string& n) {
    POp o;
    o.name = n;
    if (n == "_") {
      o.k = O_SINK;
      return o;
    }
    if (findReg(n, o)) return o;
    if (n[0] == '%') {
      int s = sregId(n);
      if (s >= 0) {
        o.k = O_SREG;
        o.idx = s;
        return o;
      }
      if (n.rfind("%envreg", 0) == 0 || n.rfind("%pm", 0) == 0) {
        o.k = O_SREG;
        o.idx = SR_ZERO;
        return o;
      }
    }
    if (n == "WARP_SZ") {
      o.k = O_IMM;
      o.ival = 32;
      return o;
    }
    o.sym = findSym(n);
    o.k = o.sym ? O_SYM : O_NAME;  // NAME: label or function, resolved later
    return o;
  }
  POp operand() {
    if (acc("!")) {
      POp o = operand();
      o.neg = !o.neg;
      return o;
    }
    if (acc("{")) {
      POp o;
      o.k = O_VEC;
      if (!is("}")) do
          o.sub.push_back(operand());
        while (acc(","));
      need("}");
      return o;
    }
    if (acc("[")) {
      POp o;
      o.k = O_MEM;
      POp b = operand();
      if (b.k == O_SYM || b.k == O_NAME || b.k == O_REG || b.k == O_SREG) {
        o.off = b.off;
        b.off = 0;
      }
      while (true) {
        if (acc("+"))
          o.off += constTerm();
        else if (acc("-"))
          o.off -= constTerm();
        else
          break;
      }
      o.sub.push_back(b);
      while (acc(",")) o.sub.push_back(operand());
      need("]");
      return o;
    }
    if (acc("-")) {
      POp o = operand();
      if (o.k != O_IMM) err("unexpected '-'");
      o.dval = -o.dval;
      if (o.isflt && o.fbits == 32)
        o.ival ^= 0x80000000u;
      else if (o.isflt && o.fbits == 64)
        o.ival ^= 1ull << 63;
      else
        o.ival = -o.ival;
      return o;
    }
    if (acc("(")) {
      POp o = operand();
      while (!is(")")) {
        if (acc("+"))
          o.ival += constTerm();
        else
          err("expression");
      }
      need(")");
      return o;
    }
    if (t[p].k == NUM) {
      POp o;
      parseNum(t[p++].s, o);
      return o;
    }
    std::string w = word();
    if (w == "generic" && is("(")) {
      p++;
      POp o = wordOperand(word());
      need(")");
      return o;
    }
    POp o = wordOperand(w);
    if ((o.k == O_SYM || o.k == O_NAME) && (is("+") || is("-"))) {
      while (true) {
        if (acc("+"))
          o.off += constTerm();
        else if (acc("-"))
          o.off -= constTerm();
        else
          break;
      }
    }
    return o;
  }
  // ---- variable declarations
  static Space spaceOf(const std::string& s) {
    return s == ".global"   ? SP_GLOBAL
           : s == ".const"  ? SP_CONST
           : s == ".shared" ? SP_SHARED
           : s == ".local"  ? SP_LOCAL
           : s == ".param"  ? SP_PARAM
                            : SP_GENERIC;
  }
  void putInit(Sym& s, u64 idx, const POp& o, int esz) {
    u64 v = o.ival;
    if (s.ty == F32 && o.isflt && o.fbits != 32) {
      float f = (float)o.dval;
      u32 b;
      memcpy(&b, &f, 4);
      v = b;
    }
    if (s.ty == F64 && o.isflt && o.fbits != 64) memcpy(&v, &o.dval, 8);
    if ((idx + 1) * esz > s.init.size()) s.init.resize((idx + 1) * esz);
    memcpy(&s.init[idx * esz], &v, esz > 8 ? 8 : esz);
  }
  void initList(Sym& s, u64& idx, int esz) {
    if (acc("{")) {
      if (!is("}")) do {
          initList(s, idx, esz);
        } while (acc(","));
      need("}");
      return;
    }
    if (t[p].k == WORD) {
      std::string w = word();
      s64 add = 0;
      if (w == "generic" && acc("(")) {
        w = word();
        if (acc("+")) add += constTerm();
        need(")");
      } else if (t[p].s == "(" && w.rfind("0x", 0) == 0)
        err("masked initialiser");
      if (acc("+"))
        add += constTerm();
      else if (acc("-"))
        add -= constTerm();
      if ((idx + 1) * esz > s.init.size()) s.init.resize((idx + 1) * esz);
      s.relocs.push_back({idx * esz, w, add});
      idx++;
      return;
    }
    if (t[p].k == NUM && t[p + 1].s == "(") err("masked address initialiser is not supported");
    POp o = operand();
    putInit(s, idx, o, esz);
    idx++;
  }
  std::vector<std::unique_ptr<Sym>> varDecl(Space sp, bool ext) {  // after the space word
    std::vector<std::unique_ptr<Sym>> out;
    int align = 0;
    Ty ty = T_NONE;
    int vec = 1;
    while (t[p].k == WORD && t[p].s[0] == '.') {
      std::string w = word();
      if (w == ".align")
        align = (int)constInt();
      else if (w == ".ptr") {
      } else if (w == ".v2")
        vec = 2;
      else if (w == ".v4")
        vec = 4;
      else if (w == ".v8")
        vec = 8;
      else if (tyParse(w.substr(1)) != T_NONE)
        ty = tyParse(w.substr(1));
      else if (w == ".global" || w == ".const" || w == ".shared" || w == ".local") {
      } else if (w == ".attribute") {
        need("(");
        while (!acc(")")) p++;
      } else if (w == ".texref" || w == ".samplerref" || w == ".surfref")
        ty = B64;
      else
        err("unknown variable attribute " + w);
    }
    do {
      auto s = std::make_unique<Sym>();
      s->name = word();
      s->space = sp;
      s->ty = ty;
      s->ext = ext;
      int esz = tySize(ty) * vec;
      bool open = false;
      u64 cnt = 1;
      while (acc("[")) {
        if (is("]")) {
          open = true;
          cnt = 0;
        } else
          cnt *= (u64)constInt();
        need("]");
      }
      if (is("<")) err("parameterised variable");
      s->align = align ? align : esz;
      if (acc("=")) {
        u64 idx = 0;
        initList(*s, idx, tySize(ty));
        if (open) {
          cnt = idx;
        }
      }
      s->count = cnt;
      s->size = cnt * esz;
      if (!s->init.empty() && s->init.size() < s->size) s->init.resize(s->size);
      out.push_back(std::move(s));
    } while (acc(","));
    return out;
  }
  // ---- functions
  void paramList(std::vector<Param>& v, int& bytes) {
    need("(");
    int off = 0;
    if (!is(")")) do {
        std::string w = word();
        Space sp = w == ".param" ? SP_PARAM : SP_GENERIC;
        if (w != ".param" && w != ".reg") err("expected .param");
        (void)sp;
        auto d = varDecl1Param();
        d.off = (off + d.align - 1) / d.align * d.align;
        off = d.off + d.size;
        v.push_back(d);
      } while (acc(","));
    need(")");
    bytes = off;
  }
  Param varDecl1Param() {
    Param r{"", T_NONE, 0, 0, 0};
    int align = 0;
    while (t[p].k == WORD && t[p].s[0] == '.') {
      std::string w = word();
      if (w == ".align") {
        int a = (int)constInt();
        align = align ? align : a;
      } else if (w == ".ptr") {
        while (t[p].k == WORD &&
               (is(".align") || is(".global") || is(".shared") || is(".const") || is(".local"))) {
          bool al = is(".align");
          p++;
          if (al) constInt();
        }
      } else if (tyParse(w.substr(1)) != T_NONE)
        r.ty = tyParse(w.substr(1));
    }
    if (t[p].k == WORD) r.name = word();
    u64 cnt = 1;
    while (acc("[")) {
      if (is("]"))
        cnt = 0;
      else
        cnt *= (u64)constInt();
      need("]");
    }
    r.size = (int)(cnt * tySize(r.ty));
    r.align = align ? align : (tySize(r.ty) ? tySize(r.ty) : 1);
    return r;
  }
  void regDecl() {
    Ty ty = T_NONE;
    int vec = 1;
    while (t[p].k == WORD && t[p].s[0] == '.') {
      std::string w = word();
      if (w == ".v2")
        vec = 2;
      else if (w == ".v4")
        vec = 4;
      else
        ty = tyParse(w.substr(1));
    }
    if (ty == T_NONE) err("register type");
    if (vec != 1) err("vector registers are not supported");
    bool pr = ty == PRED;
    int per = ty == B128 ? 2 : 1;
    do {
      std::string n = word();
      int cnt = 1;
      bool range = false;
      if (acc("<")) {
        cnt = (int)constInt();
        need(">");
        range = true;
      }
      RegRange r{pr ? F->npreds : F->nregs, cnt, ty, pr};
      if (pr)
        F->npreds += cnt;
      else {
        F->nregs += cnt * per;
        for (int i = 0; i < cnt * per; i++) F->regWidth.push_back(ty == B128 ? 8 : tySize(ty));
      }
      if (range)
        scopes.back().ranges[n] = r;
      else
        scopes.back().regs[n] = r;
    } while (acc(","));
    need(";");
  }
  void funcDirectives() {
    while (t[p].k == WORD && t[p].s[0] == '.' && !is("{") && !is(";")) {
      std::string w = word();
      int* dst = w == ".reqntid" ? F->reqntid : w == ".maxntid" ? F->maxntid : nullptr;
      if (w == ".pragma") {
        while (!acc(";")) p++;
        continue;
      }
      int v[3] = {1, 1, 1}, n = 0;
      while (t[p].k == NUM || is(",")) {
        if (acc(",")) continue;
        v[n < 3 ? n : 2] = (int)constInt();
        n++;
      }
      if (dst && n)
        for (int i = 0; i < 3; i++) dst[i] = v[i];
    }
  }
  void body() {
    need("{");
    scopes.clear();
    scopes.push_back({});
    F->scopeParent = {-1};
    auto addParamSyms = [&](std::vector<Param>& v) {
      for (auto& q : v) {
        auto s = std::make_unique<Sym>();
        s->name = q.name;
        s->space = SP_PARAM;
        s->addr = q.off;
        s->size = q.size;
        s->align = q.align;
        s->placed = true;
        s->ext = true;
        scopes[0].syms[q.name] = s.get();
        F->locals.push_back(std::move(s));
      }
    };
    // device-function frames: params first, then return values, then call-scoped variables
    if (!F->entry) {
      int b = (F->paramBytes + 15) & ~15;
      for (auto& r : F->rets) r.off += b;
      F->paramSpace = b + ((F->retBytes + 15) & ~15);
    }
    addParamSyms(F->params);
    addParamSyms(F->rets);
    int depth = 1;
    while (depth) {
      if (t[p].k == END) err("unexpected end");
      if (acc("{")) {
        int par = scopes.back().id;
        scopes.push_back({});
        scopes.back().id = (int)F->scopeParent.size();
        F->scopeParent.push_back(par);
        depth++;
        continue;
      }
      if (acc("}")) {
        scopes.pop_back();
        depth--;
        continue;
      }
      if (acc(";")) continue;
      statement();
    }
    F->body = true;
  }
  void statement() {
    if (t[p].k == WORD && t[p + 1].s == ":" && t[p + 1].k == PUNCT) {
      std::string lab = word();
      p++;
      if (is(".branchtargets")) {
        p++;
        auto& v = F->targets[lab];
        do v.push_back(word());
        while (acc(","));
        need(";");
        return;
      }
      if (is(".callprototype") || is(".calltargets")) {
        while (!acc(";")) p++;
        return;
      }
      F->labels[lab + "@" + std::to_string(scopes.back().id)] = (int)F->code.size();
      return;
    }
    if (is(".reg")) {
      p++;
      regDecl();
      return;
    }
    if (is(".loc")) {
      p++;
      curFile = (int)constTerm();
      curLine = (int)constTerm();
      constTerm();
      while (acc(",")) {
        std::string w = word();
        if (w == "function_name") {
          word();
          if (acc("+")) constTerm();
        } else {
          constTerm();
          constTerm();
          constTerm();
        }
      }  // inlined_at
      return;
    }
    if (is(".pragma")) {
      while (!acc(";")) p++;
      return;
    }
    if (is(".local") || is(".shared") || is(".param") || is(".const") || is(".global") ||
        is(".extern")) {
      bool ext = acc(".extern");
      Space sp = spaceOf(word());
      for (auto& s : varDecl(sp, ext)) {
        if (sp == SP_LOCAL) {
          F->localSize = (F->localSize + s->align - 1) / s->align * s->align;
          s->addr = F->localSize;
          F->localSize += s->size;
          s->placed = true;
        }
        if (sp == SP_PARAM) {
          F->paramSpace = (F->paramSpace + 15) & ~15ull;
          s->addr = F->paramSpace;
          F->paramSpace += s->size;
          s->placed = true;
        }
        scopes.back().syms[s->name] = s.get();
        F->locals.push_back(std::move(s));
      }
      need(";");
      return;
    }
    if (t[p].k == WORD && t[p].s[0] == '.' && t[p].s != ".")
      err("unknown directive in function body");
    instruction();
  }
  void instruction() {
    PInst I;
    I.line = t[p].line;
    I.srcfile = curFile;
    I.srcline = curLine;
    I.scope = scopes.back().id;
    size_t b = t[p].pos;
    if (acc("@")) {
      I.hasGuard = true;
      I.gneg = acc("!");
      POp o = wordOperand(word());
      if (o.k != O_PRED) err("guard is not a predicate");
      I.guard = o.idx;
    }
    I.full = word();
    {
      std::stringstream ss(I.full);
      std::string x;
      bool first = true;
      while (std::getline(ss, x, '.')) {
        if (first)
          I.op = x;
        else
          I.mods.push_back(x);
        first = false;
      }
    }
    if (I.op == "call") {
      auto list = [&](std::vector<POp>& v) {
        need("(");
        if (!is(")")) do
            v.push_back(operand());
          while (acc(","));
        need(")");
      };
      if (is("(")) {
        list(I.callRets);
        need(",");
      }
      I.ops.push_back(operand());
      if (acc(",")) {
        if (is("(")) {
          list(I.callArgs);
          if (acc(",")) I.proto = word();
        } else
          I.proto = word();
      }
      need(";");
    } else {
      if (!is(";")) do {
          I.ops.push_back(operand());
          if (acc("|")) {
            I.hasDual = true;
            I.dual = operand();
          }
        } while (acc(","));
      need(";");
    }
    I.text = src.substr(b, t[p - 1].end - b);
    for (auto& c : I.text)
      if (c == '\t' || c == '\n') c = ' ';
    if (I.text.size() > 400) I.text = I.text.substr(0, 400) + "...";
    F->code.push_back(std::move(I));
  }
  void skipSection() {
    while (!is("{")) p++;
    int d = 0;
    do {
      if (is("{")) d++;
      if (is("}")) d--;
      p++;
    } while (d);
  }
  void module() {
    while (t[p].k != END) {
      if (acc(";")) continue;
      if (is(".version")) {
        p += 2;
        continue;
      }
      if (is(".target")) {
        p++;
        M.target = word();
        while (acc(",")) word();
        continue;
      }
      if (is(".address_size")) {
        p += 2;
        continue;
      }
      if (is(".file")) {
        p++;
        int n = (int)constTerm();
        M.files[n] = t[p++].s;
        while (acc(",")) p++;
        continue;
      }
      if (is(".loc")) {
        p++;
        constTerm();
        constTerm();
        constTerm();
        continue;
      }
      if (is(".section")) {
        skipSection();
        continue;
      }
      if (is(".pragma") || is(".alias")) {
        while (!acc(";")) p++;
        continue;
      }
      bool ext = false;
      while (is(".extern") || is(".visible") || is(".weak") || is(".common") ||
             is(".FORCE_INLINE")) {
        ext |= is(".extern");
        p++;
      }
      if (is(".entry") || is(".func")) {
        bool entry = is(".entry");
        p++;
        auto f = std::make_unique<Func>();
        F = f.get();
        F->entry = entry;
        while (is(".noreturn") || is(".attribute")) {
          if (acc(".attribute")) {
            while (!acc(")")) p++;
          } else
            p++;
        }
        if (!entry && is("(")) paramList(F->rets, F->retBytes);
        F->name = word();
        if (is("(")) paramList(F->params, F->paramBytes);
        if (acc(".noreturn")) {
        }
        funcDirectives();
        if (is("{"))
          body();
        else
          acc(";");
        auto& slot = M.funcs[F->name];
        if (!slot || F->body) {
          slot = std::move(f);
        }
        scopes.clear();
        F = nullptr;
        continue;
      }
      if (is(".global") || is(".const") || is(".shared") || is(".local") || is(".param")) {
        Space sp = spaceOf(word());
        for (auto& s : varDecl(sp, ext)) {
          auto& slot = M.syms[s->name];
          if (slot && slot->size && !s->size) continue;
          Sym* raw = s.get();
          if (slot) {
            *slot = *s;
            continue;
          }
          slot = std::move(s);
          M.symOrder.push_back(raw);
        }
        need(";");
        continue;
      }
      err("unknown module-level directive");
    }
    for (auto& kv : M.funcs) M.funcOrder.push_back(kv.second.get());
  }
};
}  // namespace
void parsePtx(const std::string& src, PModule& m) {
  Parser p(src, m);
  p.module();
}
