// The public face: a module as its user sees it, and the checks before a launch.
#include "csrc/ptx/interpreter.h"

#include <chrono>

#include "csrc/ptx/instructions/async_proxy.h"
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr uint64_t kMaxSharedBytes = 227 * 1024;
constexpr int64_t kMaxThreads = 1024;
constexpr uint64_t kCallStackBytes = 16384;

uint64_t round_up16(uint64_t value) { return (value + 15) & ~uint64_t{15}; }

void check_shape(const Function& kernel, const LaunchOptions& options) {
  int64_t threads = 1;
  for (size_t axis = 0; axis < 3; axis++) {
    if (options.grid[axis] < 1 || options.block[axis] < 1 || options.cluster[axis] < 1)
      throw Error("grid, block and cluster sizes must be positive");
    if (options.grid[axis] % options.cluster[axis])
      throw Error("grid is not a multiple of the cluster size");
    threads *= options.block[axis];
    if (kernel.required_threads[0] && kernel.required_threads[axis] != options.block[axis])
      throw Error("block size differs from .reqntid");
  }
  if (threads > kMaxThreads) throw Error(concat("more than ", kMaxThreads, " threads in a block"));
  const auto& [x, y, z] = kernel.max_threads;
  if (x && threads > int64_t{x} * y * z)
    throw Error("block has more threads than .maxntid (launch bounds)");
}

// Dynamic shared memory begins behind the kernel's static variables, wherever a function that was
// decoded for another kernel expects it.
void check_dynamic_shared(const Program& program, const Function& kernel) {
  if (!kernel.has_calls) return;
  for (const Function* function : program.functions)
    if (!function->is_entry && function->uses_dynamic_shared &&
        function->shared_bytes != kernel.shared_bytes)
      throw Error(concat("dynamic shared memory in function ", demangle(function->name),
                         " beside static shared memory of kernel ", demangle(kernel.name),
                         " is not supported"));
}

std::vector<MemoryRange> sorted_ranges(std::vector<MemoryRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const MemoryRange& a, const MemoryRange& b) { return a.begin < b.begin; });
  for (size_t k = 1; k < ranges.size(); k++)
    if (ranges[k].begin < ranges[k - 1].end)
      throw Error(concat("buffer ", ranges[k].name, " overlaps ", ranges[k - 1].name));
  return ranges;
}

}  // namespace

struct Module::State : Program {};

Module::Module(const std::string& text) : state_(std::make_unique<State>()) {
  parse(text, state_->module);
  state_->place();
}
Module::~Module() = default;

std::vector<Kernel> Module::kernels() const {
  std::vector<Kernel> found;
  for (const Function* function : state_->functions) {
    if (!function->is_entry) continue;
    Kernel& kernel = found.emplace_back(
        Kernel{function->name, demangle(function->name), function->parameter_bytes, {}});
    for (const FunctionParameter& parameter : function->parameters)
      kernel.parameters.push_back({parameter.offset, parameter.size, parameter.alignment});
  }
  return found;
}

std::pair<uint64_t, uint64_t> Module::variable(const std::string& name) const {
  for (const auto& [mangled, symbol] : state_->module.symbols)
    if (symbol->placed && (mangled == name || demangle(mangled) == name))
      return {symbol->address, symbol->size};
  return {0, 0};
}

std::string Module::launch(const std::string& kernel_name, const LaunchOptions& options,
                           std::span<const unsigned char> parameters, std::vector<Buffer> buffers) {
  Program& program = *state_;
  Function& kernel = *program.find_kernel(kernel_name);
  check_shape(kernel, options);
  if (parameters.size() != static_cast<size_t>(kernel.parameter_bytes))
    throw Error(concat("kernel ", demangle(kernel.name), " takes ", kernel.parameter_bytes,
                       " bytes of parameters, ", parameters.size(), " were passed"));
  for (Function* function : program.functions)
    if (!function->is_entry && function->has_body) program.decode(*function);
  program.decode(kernel);
  check_dynamic_shared(program, kernel);

  // Tensor maps among the parameters are read in place, and need their alignment.
  AlignedBytes parameter_storage(parameters.size() + 1);
  std::copy(parameters.begin(), parameters.end(), parameter_storage.data());
  Launch launch;
  launch.program = &program;
  launch.kernel = &kernel;
  launch.options = options;
  launch.parameters = parameter_storage.data();
  launch.parameter_bytes = parameters.size();
  launch.check_races = options.races || options.stop_at_race;
  launch.checks_proxies = reads_through_async_proxy(program, kernel);
  launch.shared_bytes = kernel.shared_bytes + options.shared_bytes;
  if (launch.shared_bytes > kMaxSharedBytes)
    throw Error(concat("more than ", kMaxSharedBytes / 1024, " KiB of shared memory in a block"));
  launch.local_bytes_per_lane =
      round_up16(kernel.local_bytes) + (kernel.has_calls ? kCallStackBytes : 0);

  std::vector<MemoryRange> ranges = program.ranges;
  for (Buffer& buffer : buffers)
    ranges.push_back({buffer.begin, buffer.begin + buffer.bytes, buffer.read_only, Space::kGlobal,
                      std::move(buffer.name)});
  const auto begin = reinterpret_cast<uint64_t>(launch.parameters);
  ranges.push_back({begin, begin + std::max<uint64_t>(parameters.size(), 1), true, Space::kParam,
                    "kernel parameters"});
  launch.ranges = sorted_ranges(std::move(ranges));

  for (Function* function : program.functions)
    for (const Instruction& instruction : function->code)
      instruction.warp_count = instruction.lane_count = 0;
  const auto start = std::chrono::steady_clock::now();
  launch.run();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return launch.report(elapsed.count());
}

}  // namespace mergeme::ptx
