// The machine that runs a kernel: decoded instructions, and the state of warps, blocks and
// launches.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/ptx/interpreter.h"
#include "csrc/ptx/numbers.h"
#include "csrc/ptx/parser.h"
#include "csrc/ptx/statistics.h"

namespace mergeme::ptx {

struct Warp;
struct Block;
struct Launch;
struct Instruction;
struct Program;

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kFullMask = 0xffffffff;
inline constexpr uint32_t kNoPc = 0xffffffff;
// Addresses in the .shared and .local windows start here, so that a zero is never valid; 1 KiB of
// a block's shared memory is the system's on sm_90.
inline constexpr uint64_t kSharedBase = 1024;
inline constexpr uint64_t kLocalBase = 256;
// What a function's name is worth in a register: this, plus its place among the functions.
inline constexpr uint64_t kFunctionBase = 0xf0000000;
// The first rows of registers take what is written to _; .b128 needs two.
inline constexpr int kSinkRows = 2;

// Carries an instruction out for the lanes of a mask.
using Handler = void (*)(Warp&, const Instruction&, uint32_t mask);

// What the scheduler does with an instruction beyond calling its handler.
enum class Control : uint8_t {
  kNone,
  kBranch,
  kIndexedBranch,
  kCall,
  kReturn,
  kExit,
  kBarrier,
  kWarpSync,  // waits for the lanes of its member mask, or for the whole warp
  kTryWait,   // repeated until its handler reports success
  kYield,
  kClusterBarrier,
  kWgmmaWait
};

enum class Comparison : uint8_t {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kLo,
  kLs,
  kHi,
  kHs,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan
};

// What an instruction does at a barrier: bar.sync does both, bar.red also combines predicates.
enum class BarrierPart : uint8_t { kSync, kArrive, kWait, kReduce };

enum class Reduction : uint8_t { kAdd, kMin, kMax, kInc, kDec, kCas, kExch, kAnd, kOr, kXor };

// A register is a row of 32 words, one for each lane. Immediates and special registers have rows of
// their own, so that a handler reads every operand in the same way.
enum class Bank : uint8_t { kRegisters, kImmediates, kSpecialRegisters };

struct Operand {
  OperandKind kind = OperandKind::kNone;
  Bank bank = Bank::kRegisters;
  uint8_t width = 8;  // bytes of the register
  bool negated = false;
  bool in_frame = false;  // a .local address: counts from the function's own part of local memory
  int index = 0;          // row of the bank, or number of the predicate
  int64_t offset = 0;     // of an address; size in bytes of a call's .param variable
  uint16_t first = 0;     // elements of a vector, or of what follows an address, in
  uint16_t count = 0;     // Instruction::elements
};

struct MatrixMultiply;

struct Instruction {
  // What the loop reads for every instruction comes first.
  Handler execute = nullptr;
  mutable uint64_t warp_count = 0;
  mutable uint64_t lane_count = 0;
  Control control = Control::kNone;
  bool guard_negated = false;
  int guard = -1;
  int target = -1;

  Type type = Type::kNone;         // the last of the modifiers, unless the decoder says otherwise
  Type source_type = Type::kNone;  // where there are two: cvt, setp, dp4a
  Space space = Space::kGeneric;
  Rounding rounding = Rounding::kRn;
  Comparison comparison = Comparison::kEq;
  Reduction reduction = Reduction::kAdd;
  BarrierPart barrier_part = BarrierPart::kSync;
  uint8_t bool_operation = 0;
  uint8_t vector_size = 1;
  uint8_t element_size = 0;
  uint8_t variant = 0;  // which of the opcode's forms, where they share a handler
  bool ftz = false;
  bool sat = false;
  bool satfinite = false;
  bool relu = false;
  bool nan = false;
  bool xorsign = false;
  bool abs = false;
  bool carry_in = false;
  bool carry_out = false;
  bool multicast = false;
  bool aligned = false;     // every lane of the warp takes part
  bool call_param = false;  // its .param address is a variable of a call, not the kernel's
  bool flag = false;
  bool second_flag = false;
  bool has_second_output = false;
  int num_operands = 0;
  int immediate = 0;
  int member_mask = -1;  // operand of a .sync instruction that names its lanes
  std::array<Operand, 6> operands;
  Operand second_output;
  std::vector<Operand> elements;
  std::vector<int> targets;  // of brx.idx
  std::unique_ptr<MatrixMultiply> matrix;
  const ParsedInstruction* source = nullptr;
  Function* callee = nullptr;
  int name = 0;  // in Program::instruction_names, for statistics
};

// Shape and operands of mma, wmma and wgmma.
struct MatrixMultiply {
  int m, n, k;
  Type a_type, b_type, c_type, d_type;
  int num_d = 0;
  int num_a = 0;
  int num_b = 0;
  int num_c = 0;
  std::array<Operand, 16> d, a, b, c;
  bool satfinite = false;
  bool transposed_a = false;
  bool transposed_b = false;
};

// Zeroed bytes that begin at a multiple of 1024, as far as any kernel asks of shared memory.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t bytes);
  uint8_t* data() { return data_; }

 private:
  std::vector<uint8_t> storage_;
  uint8_t* data_ = nullptr;
};

struct Function : ParsedFunction {
  // Made when the function is first needed. One more than parsed: a return at the end.
  std::vector<Instruction> code;
  std::vector<uint64_t> immediates;
  std::unordered_map<uint64_t, int> immediate_rows;
  std::vector<uint64_t> immediate_bank;
  uint64_t shared_bytes = 0;  // static; dynamic shared memory begins behind them
  bool uses_dynamic_shared = false;
  bool has_calls = false;
  // Rows of registers that wgmmas work on, and the place of each row among them or -1.
  std::vector<int> wgmma_rows;
  std::vector<int> wgmma_places;
  int num_registers() const { return static_cast<int>(register_widths.size()); }
};

// Memory that a kernel may reach.
struct MemoryRange {
  uint64_t begin;
  uint64_t end;
  bool read_only;
  Space space;
  std::string name;
};

// One cp.async of one lane: its bytes arrive when they are waited for, not before.
struct AsyncCopy {
  uint32_t destination;  // offset in the block's shared memory
  uint64_t source;
  uint32_t bytes;
  uint32_t source_bytes;  // the rest is zero
  uint64_t group;
  uint64_t sequence;
};

// One bulk or tensor copy. Loads land when their mbarrier is awaited; stores read their source when
// their group is awaited, or at once (half of the seeds), and land at the latest then.
struct BulkCopy {
  Block* mbarrier_block = nullptr;
  uint32_t mbarrier = 0;
  int64_t bytes = 0;
  uint64_t group = 0;
  bool was_read = false;
  std::function<void()> read;
  std::function<void()> land;
};

// cp.async.mbarrier.arrive: an arrival due once the copies before it have landed.
struct PendingArrival {
  uint32_t mbarrier;
  Warp* warp;
  int lane;
  uint64_t sequence;
};

// A wgmma in flight, with a digest of the shared memory it reads: nobody may change that yet.
struct WgmmaRecord {
  uint64_t digest;
  std::vector<uint32_t> offsets;           // in shared memory, of 16 bytes each
  std::vector<const uint64_t*> registers;  // rows that hold A
  const Instruction* instruction;
};

// What an accumulator register will hold once its wgmma group is awaited.
struct PendingAccumulator {
  std::array<uint64_t, kWarpSize> values;
  uint64_t group;
  const Instruction* instruction;
};

// A function being run by some lanes of a warp.
struct Frame {
  Function* function = nullptr;
  std::vector<uint64_t> registers;
  std::vector<uint32_t> predicates;  // one bit a lane
  std::array<uint32_t, kWarpSize> pc{};
  uint32_t mask = 0;        // lanes in the function
  uint32_t waiting = 0;     // of them, those that wait for others
  uint32_t at_barrier = 0;  // of them, those that wait for other warps
  uint32_t called_by = 0;
  std::vector<uint8_t> params;  // .param space of the lanes, one after the other
  uint64_t local_base = 0;
  const Instruction* call = nullptr;

  uint64_t param_bytes() const { return params.size() / kWarpSize; }
};

enum class Access : uint8_t { kRead, kWrite, kAtomic };
enum class RunResult : uint8_t { kBudgetSpent, kBlocked, kFinished, kWaiting };

struct Warp {
  Block* block;
  Launch* launch;
  int id;
  uint32_t alive = 0;
  uint32_t carry = 0;  // the condition code of each lane
  std::array<const uint64_t*, 3> banks{};
  uint64_t* registers = nullptr;
  const Instruction* code = nullptr;
  uint32_t* predicates = nullptr;
  std::vector<std::unique_ptr<Frame>> frames;
  std::vector<std::unique_ptr<Frame>> spare_frames;
  std::vector<uint64_t> special_registers;
  uint8_t* local_memory = nullptr;
  uint64_t local_bytes = 0;  // of each lane
  uint64_t frame_local = 0;

  std::array<std::vector<AsyncCopy>, kWarpSize> async_copies;
  std::array<uint64_t, kWarpSize> async_group{};
  uint64_t async_sequence = 0;
  std::array<std::vector<BulkCopy*>, kWarpSize> bulk_copies;
  std::array<uint64_t, kWarpSize> bulk_group{};
  std::unordered_map<uint64_t*, PendingAccumulator> pending_accumulators;
  uint64_t wgmma_group = 0;
  std::vector<WgmmaRecord> open_wgmmas;
  std::vector<std::vector<WgmmaRecord>> wgmma_groups;
  // What the registers that wgmmas work on held at the last wgmma.fence; empty before the first.
  std::vector<uint64_t> fenced_registers;
  uint32_t warp_barriers = 0;  // bar.warp.sync of all lanes passed so far
  // The access that the race check saw last, by which lanes, and the number it got.
  const Instruction* checked = nullptr;
  uint32_t checked_lanes = 0;
  uint64_t checked_serial = 0;
  std::array<uint32_t, kWarpSize> proxy_fence{};  // Block::proxy_fences at its last one, by lane

  // The lanes that run together, valid while has_group; otherwise Frame::pc says where each lane
  // is.
  bool has_group = false;
  uint32_t pc = 0;
  uint32_t mask = 0;
  uint32_t limit = 0;      // where the next other lane waits to be joined
  uint32_t avoid = kNoPc;  // a loop that has run for long: let lanes behind it go first
  int loop_steps = 0;

  bool blocked = false;
  bool done = false;
  bool wait_failed = false;
  bool touched_shared = false;  // did the last resolve() end in shared memory?
  const Instruction* current = nullptr;
  size_t last_range = 0;
  bool in_cluster_wait = false;
  uint32_t cluster_arrived = 0;
  uint32_t cluster_target = 0;

  // warp.cpp: runs until the budget of instructions is spent or the warp must wait.
  RunResult run(int budget);
  // Picks the lanes that run next: those furthest behind, so that the others can be joined.
  void regroup();
  void enter_frame();
  // Writes the group's pc to its lanes; the group is no more.
  void leave_group(uint32_t next_pc);
  void branch(const Instruction& instruction, uint32_t taken);
  void indexed_branch(const Instruction& instruction, uint32_t lanes);
  bool wgmma_wait(const Instruction& instruction);  // false: other warps are not that far

  // diagnostics.cpp: stops the launch.
  [[noreturn]] void fail(const Instruction& instruction, int lane, const std::string& message);

  // synchronization.cpp
  void synchronize(const Instruction& instruction);
  void synchronize_whole(const Instruction& instruction);
  void synchronize_members(const Instruction& instruction);
  bool gather_whole(uint32_t& lanes);  // false: the lanes wait for the rest of the warp
  uint32_t gathered_at_pc() const;
  void barrier(const Instruction& instruction);
  void cluster_barrier(const Instruction& instruction);

  // calls.cpp
  void call(const Instruction& instruction, uint32_t lanes);
  void return_from_call(uint32_t lanes);
  void exit(uint32_t lanes);

  // memory.cpp: the host's address of an access, or the launch stops.
  uint8_t* resolve(const Instruction& instruction, int lane, uint64_t address, uint32_t bytes,
                   Space space, Access access);
  uint8_t* resolve_shared(const Instruction& instruction, int lane, uint64_t address,
                          uint32_t bytes, Access access);
  uint8_t* resolve_global(const Instruction& instruction, int lane, uint64_t address,
                          uint32_t bytes, Access access);
  uint8_t* resolve_local(const Instruction& instruction, int lane, uint64_t address,
                         uint32_t bytes);
  uint8_t* resolve_param(const Instruction& instruction, int lane, uint64_t address, uint32_t bytes,
                         Access access);
  uint8_t* resolve_generic(const Instruction& instruction, int lane, uint64_t address,
                           uint32_t bytes, Access access);
  // The block of the cluster whose shared memory holds a generic address, or none.
  Block* shared_owner(uint64_t address);
  // The block that a .shared::cluster address names; none if its rank is outside the cluster.
  Block* addressed_block(uint64_t address);

  // races.cpp
  void check_race(const Instruction& instruction, int lane, Block& owner, uint32_t offset,
                  uint32_t bytes, Access access);
  // Counts a copy under way to bytes of the block's own shared memory, or (-1) one that lands.
  void note_copy(uint32_t offset, uint32_t bytes, int change);
  // statistics.cpp
  void count_global(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, bool store);
  void count_shared(const uint64_t* addresses, uint32_t lanes, uint32_t bytes);
  void count_access(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, bool shared,
                    bool store) {
    if (shared)
      count_shared(addresses, lanes, bytes);
    else
      count_global(addresses, lanes, bytes, store);
  }

  // instructions/: asynchronous copies of a lane of groups and sequences below these land.
  void land_async_copies(int lane, uint64_t below_group, uint64_t below_sequence);
  void land_bulk_stores(int lane, uint64_t below_group, bool only_read);
};

struct MBarrier {
  uint32_t pending;
  uint32_t expected;
  int64_t pending_bytes;
  uint64_t phase;
  uint64_t opaque;  // what shared memory holds for it: anything else there means it was overwritten
};

// One of a block's sixteen barriers (bar.sync and its kin).
struct Barrier {
  struct Reduce {
    Warp* warp;
    const Instruction* instruction;
    uint32_t lanes;
  };
  uint32_t expected = 0;
  uint32_t arrived = 0;
  bool all_threads = false;  // no count was given
  bool whole_block = false;
  std::vector<std::pair<Warp*, uint32_t>> waiting;
  std::vector<Reduce> reduces;
  int64_t count = 0;
  bool all_true = true;
  bool any_true = false;
};

// The last access of one kind to a byte of shared memory.
struct Touch {
  uint32_t epoch = 0;          // full barriers that the block had passed
  int16_t warp = -1;           // or kAtomic or kSeveral of races.cpp
  int8_t lane = -1;            // or kSeveral
  uint32_t warp_barriers = 0;  // that the warp had passed
  uint64_t serial = 0;         // the same for all that one instruction does at one time
  uint32_t line = 0;
};

// What the race check knows of a granule of shared memory.
struct ShadowGranule {
  Touch write;
  Touch read;
  int16_t atomic_warp = -1;  // of whose atomics the last write is one, if of one warp's alone
  uint16_t copies = 0;       // asynchronous copies on their way to it
};

struct Block {
  Launch* launch;
  std::array<int, 3> ctaid;
  int rank = 0;  // in its cluster
  std::vector<Block*>* cluster = nullptr;
  uint8_t* shared = nullptr;
  uint64_t shared_bytes = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<Barrier, 16> barriers;
  std::map<uint32_t, MBarrier> mbarriers;  // by offset in shared memory
  int live_warps = 0;
  std::vector<std::unique_ptr<BulkCopy>> bulk_copies;
  std::vector<PendingArrival> pending_arrivals;
  std::vector<ShadowGranule> shadow;
  uint32_t shadow_granule = 16;  // bytes: as small as the smallest access up to now
  uint32_t epoch = 1;            // counts full barriers
  bool complex_sync = false;     // uses what the race check does not understand
  uint32_t cluster_phase = 0;
  bool done = false;
  std::vector<uint32_t> generic_writes;  // of each byte, see instructions/async_proxy.h
  uint32_t proxy_fences = 1;
  AlignedBytes shared_storage;
  AlignedBytes local_storage;

  // synchronization.cpp: releases barriers and cluster barriers that only exited threads are
  // missing from.
  void check_barriers();
  void check_cluster();
  // instructions/: an mbarrier's phase is awaited and not complete, so let the asynchronous work
  // that signals it finish.
  void complete_async_work(uint32_t mbarrier);
};

// A module with its variables placed and its functions decoded as they are needed.
struct Program {
  ParsedModule module;
  std::vector<Function*> functions;
  std::vector<MemoryRange> ranges;
  std::vector<AlignedBytes> storage;
  std::vector<std::string> instruction_names;
  std::unordered_map<std::string, int> name_numbers;
  uint64_t function_shared_bytes = 0;

  // decode.cpp
  void place();
  void decode(Function& function);
  Function* find_kernel(const std::string& name);
};

struct Launch {
  Program* program;
  Function* kernel;
  LaunchOptions options;
  const uint8_t* parameters;
  uint64_t parameter_bytes;
  uint64_t shared_bytes = 0;
  uint64_t local_bytes_per_lane = 0;
  bool check_races = false;
  bool checks_proxies = false;  // the kernel has instructions that read through the async proxy
  bool reverse_lanes = false;   // stores and atomics of a warp from its last lane to its first
  std::mt19937_64 random;
  Statistics statistics;
  std::vector<MemoryRange> ranges;  // sorted
  uint64_t progress = 0;            // changes whenever something that a wait can see has changed
  std::vector<Block*> resident;
  std::string last_printed;  // what a thread printed before it trapped is often why

  // scheduler.cpp
  void run();
  // diagnostics.cpp: where every resident warp is.
  std::string describe_warps() const;
  // statistics.cpp: as JSON.
  std::string report(double seconds) const;
};

std::string demangle(const std::string& name);

// The 32 words of an operand.
inline const uint64_t* row(const Warp& warp, const Operand& operand) {
  return warp.banks[static_cast<size_t>(operand.bank)] +
         static_cast<size_t>(operand.index) * kWarpSize;
}
inline uint64_t* result_row(const Warp& warp, const Operand& operand) {
  return warp.registers + static_cast<size_t>(operand.index) * kWarpSize;
}
// Element k of an operand that is a vector, or the operand itself.
inline const Operand& element(const Instruction& instruction, const Operand& operand, int k) {
  return operand.kind == OperandKind::kVector ? instruction.elements[operand.first + k] : operand;
}
inline void set_predicate(Warp& warp, int index, uint32_t mask, uint32_t values) {
  uint32_t& predicate = warp.predicates[index];
  predicate = (predicate & ~mask) | (values & mask);
}

// Calls a function for every lane of a mask, in order. Most masks are full, and that loop is the
// one the compiler can vectorise.
template <typename F>
[[gnu::flatten]] inline void for_each_lane(uint32_t mask, F&& function) {
  if (mask == kFullMask) {
    for (int lane = 0; lane < kWarpSize; lane++) function(lane);
  } else {
    for (uint32_t left = mask; left; left &= left - 1) function(std::countr_zero(left));
  }
}
template <typename F>
inline void for_each_lane_backwards(uint32_t mask, F&& function) {
  for (int lane = kWarpSize - 1; lane >= 0; lane--)
    if ((mask >> lane) & 1) function(lane);
}

}  // namespace mergeme::ptx
