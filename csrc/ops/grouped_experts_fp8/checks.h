#pragma once
#include "csrc/ops/grouped_experts/checks.h"
#include "csrc/ops/grouped_matmul_fp8/checks.h"
#include "csrc/ops/quantize_fp8/checks.h"

namespace mergeme::grouped_experts_fp8 {

inline constexpr const char* kOp = "mergeme::grouped_experts_fp8";

// Gate and up are two weights, each with scales for its own rows, put one after the other. Blocks
// of 128 counted over both are the same only where no block is of gate and up at once.
inline void check_gate_up_scale(const at::Tensor& scale, int64_t experts, int64_t intermediate,
                                int64_t hidden, at::Device device) {
  const int64_t own = 2 * scale_blocks(intermediate), shared = scale_blocks(2 * intermediate);
  TORCH_CHECK_VALUE(own == shared || scale.dim() != 3 || scale.size(1) != shared, kOp,
                    ": expected gate_up_scale with ", own / 2,
                    " blocks of 128 rows for gate and as many for up, got ", shared,
                    " for both together, one of which would hold the end of gate and the start of "
                    "up: ",
                    scale.sizes());
  grouped_matmul_fp8::check_scale(kOp, "gate_up_scale", scale, {experts, own, scale_blocks(hidden)},
                                  device);
}

// Runs first in every backend. Reads no element, so it never synchronises a stream.
inline void check(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& gate_up_scale,
                  const at::Tensor& down, const at::Tensor& down_scale,
                  const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                  const at::Tensor& permutation, const at::Tensor& inverse) {
  quantize_fp8::check_quantizable(kOp, "x", x);
  check_dtype(kOp, "gate_up", gate_up, at::kFloat8_e4m3fn);
  check_dtype(kOp, "down", down, at::kFloat8_e4m3fn);
  check_dim(kOp, "x", x, 2, "[T, H]");
  check_dim(kOp, "gate_up", gate_up, 3, "[E, 2I, H]");
  check_dim(kOp, "down", down, 3, "[E, H, I]");
  const int64_t experts = gate_up.size(0), hidden = x.size(1), intermediate = gate_up.size(1) / 2;
  TORCH_CHECK_VALUE(experts >= 1 && gate_up.size(1) % 2 == 0 && gate_up.size(2) == hidden, kOp,
                    ": expected gate_up of shape [E, 2I, ", hidden, "] with E >= 1, got ",
                    gate_up.sizes());
  check_sizes(kOp, "down", down, {experts, hidden, intermediate});
  check_device(kOp, "gate_up", gate_up, x.device());
  check_device(kOp, "down", down, x.device());
  check_gate_up_scale(gate_up_scale, experts, intermediate, hidden, x.device());
  grouped_matmul_fp8::check_scale(kOp, "down_scale", down_scale,
                                  {experts, scale_blocks(hidden), scale_blocks(intermediate)},
                                  x.device());
  grouped_experts::check_routing(kOp, x, topk_weights, expert_offsets, permutation, inverse,
                                 experts);
}

}  // namespace mergeme::grouped_experts_fp8
