// Where a launch stopped, in words.
#include <cxxabi.h>

#include <cstdlib>

#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

std::string triple(int x, int y, int z) { return concat("(", x, ",", y, ",", z, ")"); }

std::string source_position(const Program& program, const ParsedInstruction& source) {
  if (!source.source_line) return "";
  const auto file = program.module.files.find(source.source_file);
  const std::string path = file == program.module.files.end() ? "?" : file->second;
  return concat(", source ", path.substr(path.find_last_of('/') + 1), ":", source.source_line);
}

std::string position(const Warp& warp, const Instruction& instruction, int lane) {
  const Block& block = *warp.block;
  const Launch& launch = *warp.launch;
  const std::array<int32_t, 3>& size = launch.options.block;
  const int thread = warp.id * kWarpSize + lane;
  const std::string who = lane < 0
                              ? concat("warp ", warp.id)
                              : "thread " + triple(thread % size[0], thread / size[0] % size[1],
                                                   thread / (size[0] * size[1]));
  return concat("kernel ", demangle(launch.kernel->name), ", block ",
                triple(block.ctaid[0], block.ctaid[1], block.ctaid[2]), ", ", who, ", PTX line ",
                instruction.source->line, source_position(*launch.program, *instruction.source),
                ": ", instruction.source->text);
}

std::string describe_lanes(const Frame& frame, int warp, uint32_t pc, uint32_t lanes) {
  const bool at_barrier = (frame.at_barrier & lanes) == lanes;
  // Lanes at a barrier will go on behind it; what they wait for is the instruction before.
  const Instruction& instruction = frame.function->code[at_barrier && pc ? pc - 1 : pc];
  const char* state = at_barrier                ? "wait at barrier, PTX line "
                      : (frame.waiting & lanes) ? "wait for the rest of the warp, PTX line "
                                                : "at PTX line ";
  std::string mask = hex(lanes).substr(2);
  mask.insert(0, 8 - mask.size(), '0');
  return concat("\n  warp ", warp, " lanes 0x", mask, " ", state, instruction.source->line, ": ",
                instruction.source->text);
}

}  // namespace

std::string demangle(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> readable(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
  return status == 0 && readable ? readable.get() : name;
}

void Warp::fail(const Instruction& instruction, int lane, const std::string& message) {
  throw Error(message + "\n  at " + position(*this, instruction, lane));
}

std::string Launch::describe_warps() const {
  constexpr int kMaxGroups = 12;
  const Block& first = *resident.front();
  std::string text = concat("\n  kernel ", demangle(kernel->name), ", block ",
                            triple(first.ctaid[0], first.ctaid[1], first.ctaid[2]));
  int groups = 0;
  for (const Block* block : resident)
    for (const std::unique_ptr<Warp>& warp : block->warps) {
      if (!warp->alive || groups >= kMaxGroups) continue;
      const Frame& frame = *warp->frames.back();
      std::map<uint32_t, uint32_t> lanes_at;
      for_each_lane(frame.mask, [&](int lane) { lanes_at[frame.pc[lane]] |= 1u << lane; });
      for (const auto& [pc, lanes] : lanes_at) {
        text += describe_lanes(frame, warp->id, pc, lanes);
        groups++;
      }
    }
  return text;
}

}  // namespace mergeme::ptx
