// Runs the launches of the host-compiled launchers in the interpreter: for every op the PTX that
// nvcc made of its launch.cu lies beside this library as _ptx/<op>.<architecture>.ptx. Torch-free.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "csrc/ptx/interpreter.h"
#include "csrc/simt/host/runtime.h"

namespace mergeme::ptx {

// What runs: the text made for an architecture ("sm_80", "sm_90a"), on a device that says it is of
// this compute capability.
struct Target {
  std::string architecture;
  int capability;
};

// One launch, as it was recorded.
struct Record {
  std::string op, variant, kernel;  // variant: the launcher's name for it; kernel: demangled
  std::string architecture;
  int capability;
  uint32_t seed;
  std::array<int32_t, 3> grid, block;
  int32_t cluster;
  uint64_t shared_bytes;
  std::string statistics;  // JSON, see Module::launch()
};

struct Settings {
  // An op runs once for each. 0 runs blocks one after another; any other keeps several alive and
  // takes another order.
  std::vector<uint32_t> seeds{0, 1, 2};
  std::optional<int> capability;  // instead of the target's own
  int32_t max_grid = 0;  // blocks along each axis if not 0: kernels must stride over their work
  bool record = false;
  bool profile = false;  // records also count every line
  double max_seconds = 600;
};
Settings& settings();

// The memory that the kernels of one op call may touch.
class Memory {
 public:
  void add(const void* begin, uint64_t bytes, bool read_only, std::string name);
  void remove(const void* begin);
  // Pieces that overlap as one; it may be written if any of them may.
  std::vector<Buffer> buffers() const;

 private:
  mutable std::mutex mutex_;
  std::multimap<uint64_t, Buffer> pieces_;
};

// While it lives, launches go to the interpreter, with the schedule of a seed.
class Scope {
 public:
  Scope(std::string op, Target target, uint32_t seed, std::shared_ptr<const Memory> memory);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  void launch(const simt::host::Launch& launch) const;

  std::string op_;
  Target target_;
  uint32_t seed_;
  std::shared_ptr<const Memory> memory_;
  std::function<void(const simt::host::Launch&)> outer_;
  int outer_capability_;
};

// The folders of ops (csrc/ops) whose PTX for an architecture was built.
std::vector<std::string> built_ops(const std::string& architecture);
// That text, or what was put in its place.
std::string text_of(const std::string& op, const std::string& architecture);
// Runs `text` instead of the op's own for the architecture; an empty text ends that.
void override_text(const std::string& op, const std::string& architecture, const std::string& text);
std::vector<Record> take_records();

// What the compiler calls the kernel whose host copy lies there.
std::string kernel_name(const void* kernel);
// The names of a text's kernels.
std::vector<std::string> kernel_names(const std::string& text);
// The text with one kernel alone; lines keep their numbers.
std::string only_kernel(const std::string& text, const std::string& kernel);

}  // namespace mergeme::ptx
