// Runs the kernels of test_kernels.cuh by name, for python_tests/simt.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/simt/launch.h"

namespace mergeme::simt::testing {

// Gives the kernel copies of exactly `in` and of `out` (so that a sanitizer sees any access
// beyond), and returns what it left in `out`.
std::vector<unsigned char> run(const std::string& kernel, const LaunchConfig& config,
                               const std::vector<unsigned char>& in,
                               const std::vector<unsigned char>& out, int64_t n);

}  // namespace mergeme::simt::testing
