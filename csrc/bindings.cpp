// The extension module: build facts for Python. Tensors never pass here; importing it registers the
// ops.
#include <pybind11/pybind11.h>

#include "csrc/common/bus_error.h"
#include "csrc/common/cpu_features.h"

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = MERGEME_TORCH_VERSION;
#if defined(MERGEME_CUDA_ARCHITECTURES)
    info["cuda_architectures"] = MERGEME_CUDA_ARCHITECTURES;
#else
    info["cuda_architectures"] = pybind11::none();
#endif
    info["cpu_available"] = mergeme::available_isas();
    info["cpu_chosen"] = mergeme::chosen_isa_name();
    return info;
  });
  m.def("report_bus_errors", mergeme::report_bus_errors, pybind11::arg("exit_code"));
}
