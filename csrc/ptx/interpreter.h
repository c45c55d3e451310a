// Runs the PTX that nvcc made of a kernel on the CPU, and checks it while it runs. A test
// instrument: it is built into the test module only, and nothing of it is ever installed.
// Torch-free.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace mergeme::ptx {

// Memory that a kernel may touch. Anything else, apart from its own shared and local memory and the
// module's variables, stops the launch. Buffers may not overlap.
struct Buffer {
  uint64_t begin;  // host address
  uint64_t bytes;
  bool read_only;
  std::string name;  // for messages
};

enum class BlockOrder : int32_t { kLinear, kReverse, kRandom };

struct LaunchOptions {
  std::array<int32_t, 3> grid{1, 1, 1};
  std::array<int32_t, 3> block{1, 1, 1};
  std::array<int32_t, 3> cluster{1, 1, 1};
  uint32_t shared_bytes = 0;  // dynamic
  uint32_t seed = 0;          // 0 runs each warp until it must wait; others take random slices
  int32_t resident = 1;       // blocks alive at one time, at least a cluster
  BlockOrder order = BlockOrder::kLinear;
  bool statistics = true;
  bool races = false;         // record hazards in shared memory
  bool stop_at_race = false;  // and stop at the first
  bool profile = false;       // counts for every line of the PTX
  uint64_t max_steps = uint64_t{1} << 40;
  double max_seconds = 600;
};

struct Parameter {
  int offset, size, alignment;
};
struct Kernel {
  std::string name;      // mangled
  std::string readable;  // demangled
  int parameter_bytes;
  std::vector<Parameter> parameters;
};

// One PTX file. Not to be used by two threads at one time.
class Module {
 public:
  explicit Module(const std::string& text);  // throws std::runtime_error where it cannot be read
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  std::vector<Kernel> kernels() const;
  // Where a .global or .const variable lies, and its bytes; 0 and 0 if there is none.
  std::pair<uint64_t, uint64_t> variable(const std::string& name) const;
  // Runs a kernel, named as in kernels(), to its end. Returns statistics as JSON; throws
  // std::runtime_error, naming kernel, block, thread, line and instruction, where it must stop.
  std::string launch(const std::string& kernel, const LaunchOptions& options,
                     std::span<const unsigned char> parameters, std::vector<Buffer> buffers);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mergeme::ptx
