#pragma once
#include "csrc/common/grouped_glue.h"
#include "csrc/ops/grouped_experts/checks.h"

namespace mergeme::packed_experts {

inline constexpr const char* kPack = "mergeme::pack_experts";
inline constexpr const char* kUnpack = "mergeme::unpack_experts";
inline constexpr const char* kExperts = "mergeme::packed_experts";
inline constexpr const char* kMatmul = "mergeme::packed_matmul";

inline void check_packable(const char* op, const char* arg, const at::Tensor& t) {
  const auto s = t.scalar_type();
  TORCH_CHECK_TYPE(s == at::kHalf || s == at::kBFloat16 || s == at::kFloat, op, ": expected ", arg,
                   " to be float16, bfloat16 or float32, got ", name_of(s));
}

inline void check_layout(const char* op, int64_t rows, bool gated, bool interleaved) {
  TORCH_CHECK_VALUE(gated || !interleaved, op, ": expected gated with interleaved, got it alone");
  TORCH_CHECK_VALUE(!gated || rows % 2 == 0, op,
                    ": expected gate and up of as many rows each, got ", rows, " rows in all");
}

// Panels of a weight with so many rows: 32 of them in each, or 16 gate and the same 16 up rows.
inline int64_t num_panels(int64_t rows, bool gated) {
  return gated ? ceil_div(rows / 2, kPanelColumns / 2) : ceil_div(rows, kPanelColumns);
}

// A weight [E, rows, depth] packed. The sizes name the depth as it is; the rest of each panel, up
// to a multiple of 32, lies between the panels.
inline std::vector<int64_t> packed_sizes(int64_t experts, int64_t rows, int64_t depth, bool gated) {
  return {experts, num_panels(rows, gated), depth, kPanelColumns};
}
inline std::vector<int64_t> packed_strides(const std::vector<int64_t>& sizes) {
  const int64_t panel = ceil_div(sizes[2], kPackedDepth) * kPackedDepth * kPanelColumns;
  return {sizes[1] * panel, panel, kPanelColumns, 1};
}

inline void check_packed(const char* op, const char* arg, const at::Tensor& packed, int64_t experts,
                         int64_t rows, int64_t depth, bool gated) {
  check_packable(op, arg, packed);
  check_dim(op, arg, packed, 4, "[E, panels, K, 32]");
  const auto sizes = packed_sizes(experts, rows, depth, gated);
  TORCH_CHECK_VALUE(packed.sizes() == sizes, op, ": expected ", arg, " to hold [", experts, ", ",
                    rows, ", ", depth, "], packed as ", at::IntArrayRef(sizes), ", got ",
                    packed.sizes());
  TORCH_CHECK_VALUE(packed.numel() == 0 || packed.strides() == packed_strides(sizes), op,
                    ": expected ", arg, " to lie in memory as pack_experts made it, got strides ",
                    packed.strides());
}

}  // namespace mergeme::packed_experts
