// Tensor maps: what a copy of a box (tensor_copy.cuh) must know of a tensor, made by the host and
// passed inside a kernel's Params, as `const __grid_constant__`. Torch-free.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "csrc/common/numeric.h"
#include "csrc/simt/launch.h"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace mergeme::simt {

// Opaque: the driver's own layout, or that of the interpreter of PTX (csrc/ptx).
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// A tensor of up to three dimensions, the innermost first, of which boxes of one element along the
// third are copied under the 128-byte swizzle.
struct TensorView {
  const void* data;
  int element_bytes;               // 1 or 2
  std::array<int64_t, 3> sizes;    // elements
  std::array<int64_t, 2> strides;  // bytes from one to the next along the second and third
  std::array<int, 2> box;          // elements along the first and second
};

// Throws where the hardware could not copy such boxes: every rule of cuTensorMapEncodeTiled, so
// that a machine without a driver finds what a driver would refuse.
inline void check_tensor_view(const char* name, const TensorView& v) {
  const auto expect = [&](bool ok, const char* what, int64_t got) {
    if (!ok)
      throw std::runtime_error(std::string(name) + ": tensor map: expected " + what + ", got " +
                               std::to_string(got));
  };
  constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStride = int64_t{1} << 40;
  expect(v.element_bytes == 1 || v.element_bytes == 2, "elements of 1 or 2 bytes", v.element_bytes);
  expect(v.data != nullptr && is_aligned(v.data), "data at a multiple of 16",
         static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data)));
  for (const int64_t size : v.sizes) expect(1 <= size && size <= kMaxSize, "sizes to 2^32", size);
  for (const int64_t stride : v.strides)
    expect(0 < stride && stride < kMaxStride && stride % 16 == 0,
           "positive strides below 2^40 that are multiples of 16 bytes", stride);
  expect(v.strides[0] >= v.sizes[0] * v.element_bytes, "rows that do not overlap", v.strides[0]);
  for (const int side : v.box) expect(1 <= side && side <= 256, "box sides of 1 to 256", side);
  expect(v.box[0] * v.element_bytes == 128, "box rows of 128 bytes", v.box[0] * v.element_bytes);
}

#if defined(__CUDACC__)
// The driver's function, asked of the runtime so that nothing links against the driver.
inline auto tensor_map_encoder(const char* name) {
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_launch(name, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                        cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}
#endif

inline TensorMap make_tensor_map(const char* name, const TensorView& v) {
  check_tensor_view(name, v);
  TensorMap map{};
#if defined(__CUDACC__)
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const cuuint64_t sizes[] = {cuuint64_t(v.sizes[0]), cuuint64_t(v.sizes[1]),
                              cuuint64_t(v.sizes[2])};
  const cuuint64_t strides[] = {cuuint64_t(v.strides[0]), cuuint64_t(v.strides[1])};
  const cuuint32_t box[] = {cuuint32_t(v.box[0]), cuuint32_t(v.box[1]), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap encoded;
  // Only bytes are copied, so any type of the size does.
  const CUresult result = tensor_map_encoder(name)(
      &encoded,
      v.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 3,
      const_cast<void*>(v.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  std::memcpy(&map, &encoded, sizeof map);
#else
  // As the interpreter reads it: TMap in csrc/ptx.
  struct {
    uint64_t magic = 0x50414d54584d5650, base;
    uint32_t rank = 3, format;  // 0 and 1: unsigned, of 1 and 2 bytes
    uint64_t sizes[5], strides[4];
    uint16_t box[5];
    uint8_t steps[5] = {1, 1, 1, 1, 1}, swizzle = 3, fill = 0, element_bytes, interleave = 0;
  } layout{.base = reinterpret_cast<uintptr_t>(v.data),
           .format = v.element_bytes == 1 ? 0u : 1u,
           .sizes = {uint64_t(v.sizes[0]), uint64_t(v.sizes[1]), uint64_t(v.sizes[2]), 1, 1},
           .strides = {uint64_t(v.strides[0]), uint64_t(v.strides[1]), 0, 0},
           .box = {uint16_t(v.box[0]), uint16_t(v.box[1]), 1, 1, 1},
           .element_bytes = uint8_t(v.element_bytes)};
  static_assert(sizeof layout <= sizeof map);
  std::memcpy(&map, &layout, sizeof layout);
#endif
  return map;
}

}  // namespace mergeme::simt
