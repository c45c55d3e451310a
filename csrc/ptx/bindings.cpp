// The interpreter as the submodule _simt.ptx, for its own tests and for looking at one kernel.
#include "csrc/ptx/bindings.h"

#include <pybind11/stl.h>

#include "csrc/ptx/interpreter.h"

namespace py = pybind11;

namespace mergeme::ptx {
namespace {

std::string launch(Module& module, const std::string& kernel, const LaunchOptions& options,
                   const py::bytes& parameters, const std::vector<Buffer>& buffers) {
  const auto bytes = static_cast<std::string>(parameters);
  const py::gil_scoped_release release;
  return module.launch(kernel, options,
                       {reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size()},
                       buffers);
}

}  // namespace

void bind(py::module_ m) {
  py::class_<Parameter>(m, "Parameter")
      .def_readonly("offset", &Parameter::offset)
      .def_readonly("size", &Parameter::size)
      .def_readonly("alignment", &Parameter::alignment);
  py::class_<Kernel>(m, "Kernel")
      .def_readonly("name", &Kernel::name)
      .def_readonly("readable", &Kernel::readable)
      .def_readonly("parameter_bytes", &Kernel::parameter_bytes)
      .def_readonly("parameters", &Kernel::parameters);
  py::class_<Buffer>(m, "Buffer")
      .def(py::init([](uint64_t begin, uint64_t bytes, bool read_only, std::string name) {
        return Buffer{begin, bytes, read_only, std::move(name)};
      }));
  py::enum_<BlockOrder>(m, "BlockOrder")
      .value("LINEAR", BlockOrder::kLinear)
      .value("REVERSE", BlockOrder::kReverse)
      .value("RANDOM", BlockOrder::kRandom);
  py::class_<LaunchOptions>(m, "LaunchOptions")
      .def(py::init<>())
      .def_readwrite("grid", &LaunchOptions::grid)
      .def_readwrite("block", &LaunchOptions::block)
      .def_readwrite("cluster", &LaunchOptions::cluster)
      .def_readwrite("shared_bytes", &LaunchOptions::shared_bytes)
      .def_readwrite("seed", &LaunchOptions::seed)
      .def_readwrite("resident", &LaunchOptions::resident)
      .def_readwrite("order", &LaunchOptions::order)
      .def_readwrite("statistics", &LaunchOptions::statistics)
      .def_readwrite("races", &LaunchOptions::races)
      .def_readwrite("stop_at_race", &LaunchOptions::stop_at_race)
      .def_readwrite("profile", &LaunchOptions::profile)
      .def_readwrite("max_steps", &LaunchOptions::max_steps)
      .def_readwrite("max_seconds", &LaunchOptions::max_seconds);
  py::class_<Module>(m, "Module")
      .def(py::init<const std::string&>(), py::arg("text"))
      .def("kernels", &Module::kernels)
      .def("variable", &Module::variable)
      .def("launch", launch, py::arg("kernel"), py::arg("options"), py::arg("parameters"),
           py::arg("buffers"));
}

}  // namespace mergeme::ptx
