// The test module that runs every CUDA source on the host shim: schedule control. Importing it
// registers torch.ops.mergeme_simt.
#include <pybind11/pybind11.h>

#include "csrc/simt/host/runtime.h"

PYBIND11_MODULE(_simt, m) {
  m.def("set_schedule", [](int schedule, uint64_t seed) {
    mergeme::simt::host::set_schedule(static_cast<mergeme::simt::host::Schedule>(schedule), seed);
  });
}
