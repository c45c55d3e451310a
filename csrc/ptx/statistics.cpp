// How well accesses of a warp coalesce, and the counts of a launch as JSON.
#include "csrc/ptx/statistics.h"

#include "csrc/ptx/literals.h"
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr int kSectorBits = 5;
constexpr int kNumBanks = 32;

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return result + '"';
}

// An object under construction.
class JsonObject {
 public:
  void add_raw(std::string_view name, std::string_view value) {
    body_ += concat(body_.empty() ? "" : ",", quoted(name), ":", value);
  }
  void add(std::string_view name, const std::string& value) { add_raw(name, quoted(value)); }
  void add(std::string_view name, const JsonObject& value) { add_raw(name, value.text()); }
  template <typename Number>
    requires std::is_arithmetic_v<Number>
  void add(std::string_view name, Number value) {
    add_raw(name, concat(value));
  }
  std::string text() const { return "{" + body_ + "}"; }

 private:
  std::string body_;
};

JsonObject traffic(const GlobalTraffic& counts) {
  JsonObject json;
  json.add("requests", counts.requests);
  json.add("sectors", counts.sectors);
  json.add("ideal_sectors", counts.ideal_sectors);
  return json;
}

struct InstructionCounts {
  uint64_t lanes = 0;
  std::map<int, std::pair<uint64_t, uint64_t>> ops;  // warp and lane instructions by name
  std::map<std::string, uint64_t> flops;             // by opcode and operand types
};

// Two for a multiply-add. The four warps of a wgmma share its 64 rows.
void count_flops(const Instruction& instruction, std::map<std::string, uint64_t>& flops) {
  const ParsedInstruction& source = *instruction.source;
  if (!instruction.matrix || source.has("load") || source.has("store")) return;
  const MatrixMultiply& matrix = *instruction.matrix;
  const int rows = source.opcode == "wgmma" ? matrix.m / 4 : matrix.m;
  const uint64_t warps = instruction.lane_count / kWarpSize;
  flops[concat(source.opcode, ".", name_of(matrix.d_type), ".", name_of(matrix.a_type))] +=
      warps * 2 * static_cast<uint64_t>(rows * matrix.n * matrix.k);
}

template <typename F>
void for_each_executed(const Program& program, F&& function) {
  for (const Function* f : program.functions)
    for (const Instruction& instruction : f->code)
      if (instruction.warp_count && &instruction != &f->code.back()) function(instruction);
}

InstructionCounts count_instructions(const Program& program) {
  InstructionCounts counts;
  for_each_executed(program, [&](const Instruction& instruction) {
    auto& [warps, lanes] = counts.ops[instruction.name];
    warps += instruction.warp_count;
    lanes += instruction.lane_count;
    counts.lanes += instruction.lane_count;
    count_flops(instruction, counts.flops);
  });
  return counts;
}

// [line, warp instructions, lane instructions, text] of everything that ran.
std::string profile(const Program& program) {
  std::string lines;
  for_each_executed(program, [&](const Instruction& instruction) {
    lines +=
        concat(lines.empty() ? "" : ",", "[", instruction.source->line, ",", instruction.warp_count,
               ",", instruction.lane_count, ",", quoted(instruction.source->text), "]");
  });
  return "[" + lines + "]";
}

}  // namespace

void Warp::count_global(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, bool store) {
  if (!lanes) return;
  // At most three sectors a lane: 64 bytes that start inside one.
  std::array<uint64_t, 3 * kWarpSize> sectors;
  size_t found = 0;
  bool sorted = true;
  for_each_lane(lanes, [&](int lane) {
    const uint64_t last = (addresses[lane] + bytes - 1) >> kSectorBits;
    for (uint64_t sector = addresses[lane] >> kSectorBits; sector <= last; sector++) {
      if (found && sector == sectors[found - 1]) continue;
      if (found && sector < sectors[found - 1]) sorted = false;
      sectors[found++] = sector;
    }
  });
  if (!sorted) {
    std::sort(sectors.begin(), sectors.begin() + found);
    found = static_cast<size_t>(std::unique(sectors.begin(), sectors.begin() + found) -
                                sectors.begin());
  }
  const uint64_t moved = static_cast<uint64_t>(std::popcount(lanes)) * bytes;
  GlobalTraffic& traffic = store ? launch->statistics.global_store : launch->statistics.global_load;
  traffic.requests++;
  traffic.sectors += found;
  // Lanes that read the same bytes need fewer sectors than their number says.
  traffic.ideal_sectors +=
      std::min<uint64_t>(found, (moved + (1 << kSectorBits) - 1) >> kSectorBits);
  launch->statistics.global_bytes += moved;
}

void Warp::count_shared(const uint64_t* addresses, uint32_t lanes, uint32_t bytes) {
  if (!lanes) return;
  SharedTraffic& traffic = launch->statistics.shared;
  traffic.requests++;
  // Accesses of eight and sixteen bytes are served in halves and quarters of the warp.
  const int lanes_at_once = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kWarpSize; first += lanes_at_once) {
    const uint32_t part = lanes & (kFullMask >> (kWarpSize - lanes_at_once) << first);
    if (!part) continue;
    std::array<uint8_t, kNumBanks> words_of_bank{};
    std::array<std::array<uint32_t, kWarpSize>, kNumBanks> words;
    uint8_t wavefronts = 0;
    for_each_lane(part, [&](int lane) {
      const auto last = static_cast<uint32_t>((addresses[lane] + bytes - 1) >> 2);
      for (auto word = static_cast<uint32_t>(addresses[lane] >> 2); word <= last; word++) {
        const uint32_t bank = word % kNumBanks;
        uint32_t* const begin = words[bank].data();
        uint32_t* const end = begin + words_of_bank[bank];
        if (std::find(begin, end, word) != end) continue;  // one word is read once for all lanes
        *end = word;
        wavefronts = std::max(wavefronts, ++words_of_bank[bank]);
      }
    });
    traffic.wavefronts += wavefronts;
    traffic.ideal_wavefronts++;
  }
}

std::string Launch::report(double seconds) const {
  JsonObject json;
  json.add("kernel", demangle(kernel->name));
  json.add("seconds", seconds);
  json.add("blocks", statistics.blocks);
  json.add("warp_instructions", statistics.warp_instructions);
  const InstructionCounts counts = count_instructions(*program);
  json.add("lane_instructions", counts.lanes);
  JsonObject ops;
  for (const auto& [name, count] : counts.ops)
    ops.add_raw(program->instruction_names[static_cast<size_t>(name)],
                concat("[", count.first, ",", count.second, "]"));
  json.add("ops", ops);
  JsonObject flops;
  for (const auto& [kind, count] : counts.flops) flops.add(kind, count);
  json.add("flops", flops);
  json.add("global_load", traffic(statistics.global_load));
  json.add("global_store", traffic(statistics.global_store));
  JsonObject shared;
  shared.add("requests", statistics.shared.requests);
  shared.add("wavefronts", statistics.shared.wavefronts);
  shared.add("ideal_wavefronts", statistics.shared.ideal_wavefronts);
  json.add("shared", shared);
  JsonObject bulk;
  bulk.add("copies", statistics.bulk.copies);
  bulk.add("bytes_loaded", statistics.bulk.bytes_loaded);
  bulk.add("bytes_stored", statistics.bulk.bytes_stored);
  json.add("bulk", bulk);
  json.add("shared_bytes_per_block", shared_bytes);
  json.add("global_bytes", statistics.global_bytes);
  json.add("barriers", statistics.barriers);
  json.add("fences", statistics.fences);
  json.add("shfl_undefined_reads", statistics.shfl_undefined_reads);
  json.add("barriers_with_exited_threads", statistics.barriers_with_exited_threads);
  json.add("races", statistics.races);
  std::string examples;
  for (const std::string& example : statistics.race_examples)
    examples += (examples.empty() ? "" : ",") + quoted(example);
  json.add_raw("race_examples", "[" + examples + "]");
  if (options.profile) json.add_raw("profile", profile(*program));
  return json.text();
}

}  // namespace mergeme::ptx
