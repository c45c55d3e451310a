// The test module that runs every CUDA source on the host shim: schedule control, and the kernels
// that test the shim itself. Importing it registers torch.ops.mergeme_simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "csrc/ptx/bindings.h"
#include "csrc/simt/host/amx.h"
#include "csrc/simt/host/test_kernels.h"

namespace {

namespace py = pybind11;
using mergeme::simt::LaunchConfig;

std::vector<unsigned char> bytes_of(std::string_view s) { return {s.begin(), s.end()}; }

py::bytes run_test_kernel(const std::string& kernel, const py::bytes& in, const py::bytes& out,
                          int64_t n, std::array<unsigned, 3> grid, std::array<unsigned, 3> block,
                          size_t shared_bytes) {
  const LaunchConfig config{.grid = {grid[0], grid[1], grid[2]},
                            .block = {block[0], block[1], block[2]},
                            .shared_bytes = shared_bytes};
  const auto input = bytes_of(in), output = bytes_of(out);
  const auto result = [&] {
    const py::gil_scoped_release release;  // as an op does: launches may come from several threads
    return mergeme::simt::testing::run(kernel, config, input, output, n);
  }();
  return {reinterpret_cast<const char*>(result.data()), result.size()};
}

py::bytes run_amx_program(const std::vector<std::pair<std::string, std::vector<int64_t>>>& program,
                          const py::bytes& memory) {
  std::vector<mergeme::simt::host::AmxStep> steps;
  for (const auto& [instruction, operands] : program) steps.push_back({instruction, operands});
  const auto input = bytes_of(memory);
  const auto result = [&] {
    const py::gil_scoped_release release;
    return mergeme::simt::host::run_amx_program(steps, input);
  }();
  return {reinterpret_cast<const char*>(result.data()), result.size()};
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.def("set_schedule", [](int schedule, uint64_t seed) {
    mergeme::simt::host::set_schedule(static_cast<mergeme::simt::host::Schedule>(schedule), seed);
  });
  m.def("set_compute_capability",
        [](int capability) { mergeme::simt::host::compute_capability = capability; });
  m.attr("sanitizer") = MERGEME_SANITIZE;
  m.def("run_test_kernel", run_test_kernel, py::arg("kernel"), py::arg("in"), py::arg("out"),
        py::arg("n"), py::arg("grid"), py::arg("block"), py::arg("shared_bytes"));
  mergeme::ptx::bind(m.def_submodule("ptx"));
  m.def("emulate_amx", mergeme::simt::host::emulate_amx, py::arg("on") = true);
  m.def("emulated_amx_instructions", mergeme::simt::host::emulated_amx_instructions);
  m.def("run_amx_program", run_amx_program, py::arg("program"), py::arg("memory"));
}
