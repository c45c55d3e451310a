// The forward on the CPU, for weights as they are and for packed ones.
#pragma once
#include "csrc/ops/grouped_experts/checks.h"
#include "csrc/ops/grouped_experts/cpu_loops.h"
#include "csrc/ops/grouped_experts/cpu_matrix.h"

namespace mergeme::grouped_experts {

inline char* element(const at::Tensor& t, int64_t i) {
  return static_cast<char*>(t.mutable_data_ptr()) + i * t.element_size();
}
inline const char* const_element(const at::Tensor& t, int64_t i) {
  return static_cast<const char*>(t.const_data_ptr()) + i * t.element_size();
}

// The routing, contiguous and checked.
struct Routing {
  Routing(const char* op, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
          const at::Tensor& permutation, const at::Tensor& inverse);
  at::Tensor weights, slots, rows;
  std::vector<int64_t> boundaries;
  int64_t num_slots, num_experts, num_rows, top_k;  // num_rows: those that have an expert
  const int32_t* slots_from(int64_t row) const { return slots.const_data_ptr<int32_t>() + row; }
};

// The experts' weights, contiguous: [E, 2I, H] and [E, H, I], or both packed.
struct Weights {
  at::Tensor gate_up;
  at::Tensor down;
  int64_t intermediate;
  bool packed;
};

// Writes out [T, H] and, if it has rows, preactivation [S, 2I].
void forward(const at::Tensor& x, const Weights& weights, const Routing& routing, Activation kind,
             const at::Tensor& out, const at::Tensor& preactivation);

// out[t] = sum over k of (weights of the routing, if `weighted`) * rows[inverse].
void combine_rows(const at::Tensor& rows, const Routing& routing, bool weighted,
                  const at::Tensor& out);

}  // namespace mergeme::grouped_experts
