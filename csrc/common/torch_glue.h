// What the torch-facing files of every op share: registration, streams, dtype mapping, checks.
#pragma once
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>

#include "csrc/common/numeric.h"

// schema.cpp and cuda.cpp are compiled twice: into _C as mergeme:: for CUDA tensors, and into
// _simt as mergeme_simt:: for CPU tensors, where launches run on the host shim. _simt defines the
// same schemas also for csrc/ptx/ops.cpp, where launches run in the PTX interpreter.
#define MERGEME_EXPAND_IMPL(ns, key, m) TORCH_LIBRARY_IMPL(ns, key, m)
#if defined(MERGEME_SIMT)
#define MERGEME_NAMESPACE mergeme_simt
#define MERGEME_DEVICE_KEY CPU
#define MERGEME_SCHEMA(m)                                                     \
  static void define_schemas(torch::Library& m);                              \
  TORCH_LIBRARY_FRAGMENT(mergeme_simt, library) { define_schemas(library); }  \
  TORCH_LIBRARY_FRAGMENT(mergeme_ptx80, library) { define_schemas(library); } \
  TORCH_LIBRARY_FRAGMENT(mergeme_ptx90, library) { define_schemas(library); } \
  static void define_schemas(torch::Library& m)
#else
#define MERGEME_NAMESPACE mergeme
#define MERGEME_DEVICE_KEY CUDA
#define MERGEME_SCHEMA(m) TORCH_LIBRARY_FRAGMENT(mergeme, m)
#endif
#define MERGEME_DEVICE_IMPL(m) MERGEME_EXPAND_IMPL(MERGEME_NAMESPACE, MERGEME_DEVICE_KEY, m)

namespace mergeme {

// Users meet dtypes by their Python names.
inline const char* name_of(at::ScalarType s) {
  switch (s) {
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kFloat8_e4m3fn:
      return "float8_e4m3fn";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    default:
      return c10::toString(s);
  }
}

inline void check_floating(const char* op, const char* arg, const at::Tensor& t) {
  const auto s = t.scalar_type();
  TORCH_CHECK_TYPE(s == at::kHalf || s == at::kBFloat16 || s == at::kFloat || s == at::kDouble, op,
                   ": expected ", arg, " to be float16, bfloat16, float32 or float64, got ",
                   name_of(s));
}
inline void check_dtype(const char* op, const char* arg, const at::Tensor& t, at::ScalarType s) {
  TORCH_CHECK_TYPE(t.scalar_type() == s, op, ": expected ", arg, " to be ", name_of(s), ", got ",
                   name_of(t.scalar_type()));
}
inline void check_dim(const char* op, const char* arg, const at::Tensor& t, int64_t dim,
                      const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": expected ", arg, " of shape ", shape, ", got ",
                    t.sizes());
}
inline void check_sizes(const char* op, const char* arg, const at::Tensor& t, at::IntArrayRef s) {
  TORCH_CHECK_VALUE(t.sizes() == s, op, ": expected ", arg, " of shape ", s, ", got ", t.sizes());
}
inline void check_device(const char* op, const char* arg, const at::Tensor& t, at::Device d) {
  TORCH_CHECK_VALUE(t.device() == d, op, ": expected ", arg, " on ", d, ", got ", t.device());
}

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

// Makes t's device current and names the stream work on it must join.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& t) {
#if !defined(MERGEME_SIMT)
    guard_.emplace(t.device());
    stream_ = at::accelerator::getCurrentStream(t.device().index()).native_handle();
#endif
  }
  void* stream() const { return stream_; }

 private:
  std::optional<c10::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace mergeme
