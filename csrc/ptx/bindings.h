#pragma once
#include <pybind11/pybind11.h>

namespace mergeme::ptx {

// Puts the interpreter's classes into a Python module.
void bind(pybind11::module_ module);

}  // namespace mergeme::ptx
