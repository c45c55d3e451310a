// The interpreter as the submodule _simt.ptx, for its own tests and for looking at one kernel; and
// what tests set and read of the ops that run in it.
#include "csrc/ptx/bindings.h"

#include <pybind11/stl.h>

#include "csrc/ptx/backend.h"
#include "csrc/ptx/interpreter.h"
#include "csrc/ptx/ops.h"

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

  register_ops();
  py::class_<Record>(m, "Record")
      .def_readonly("op", &Record::op)
      .def_readonly("variant", &Record::variant)
      .def_readonly("kernel", &Record::kernel)
      .def_readonly("architecture", &Record::architecture)
      .def_readonly("capability", &Record::capability)
      .def_readonly("seed", &Record::seed)
      .def_readonly("grid", &Record::grid)
      .def_readonly("block", &Record::block)
      .def_readonly("cluster", &Record::cluster)
      .def_readonly("shared_bytes", &Record::shared_bytes)
      .def_readonly("statistics", &Record::statistics);
  py::class_<Settings>(m, "Settings")
      .def_readwrite("seeds", &Settings::seeds)
      .def_readwrite("capability", &Settings::capability)
      .def_readwrite("max_grid", &Settings::max_grid)
      .def_readwrite("record", &Settings::record)
      .def_readwrite("profile", &Settings::profile)
      .def_readwrite("max_seconds", &Settings::max_seconds);
  m.attr("settings") = py::cast(&settings(), py::return_value_policy::reference);
  m.def("take_records", take_records);
  m.def("built_ops", built_ops, py::arg("architecture"));
  m.def("text_of", text_of, py::arg("op"), py::arg("architecture"));
  m.def("override_text", override_text, py::arg("op"), py::arg("architecture"), py::arg("text"));
  m.def("kernel_names", kernel_names, py::arg("text"));
  m.def("only_kernel", only_kernel, py::arg("text"), py::arg("kernel"));
}

}  // namespace mergeme::ptx
