// The test module that runs every CUDA source on the host shim: schedule control, and the kernels
// that test the shim itself. Importing it registers torch.ops.mergeme_simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

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

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.def("set_schedule", [](int schedule, uint64_t seed) {
    mergeme::simt::host::set_schedule(static_cast<mergeme::simt::host::Schedule>(schedule), seed);
  });
  m.attr("sanitizer") = MERGEME_SANITIZE;
  m.def("run_test_kernel", run_test_kernel, py::arg("kernel"), py::arg("in"), py::arg("out"),
        py::arg("n"), py::arg("grid"), py::arg("block"), py::arg("shared_bytes"));
}
