// What the torch-facing files of the merge ops share: a base and M models shaped like it.
#pragma once
#include <string_view>
#include <vector>

#include "csrc/common/task_vector.h"
#include "csrc/common/torch_glue.h"

namespace mergeme {

// `first` (called `name`) is floating, and there is at least one tensor, each like `first`.
inline void check_models(const char* op, const char* name, const at::Tensor& first,
                         at::TensorList tensors) {
  TORCH_CHECK_VALUE(!tensors.empty(), op,
                    ": expected tensors to hold at least one tensor, got an empty list");
  check_floating(op, name, first);
  for (size_t m = 0; m < tensors.size(); ++m) {
    const std::string item = "tensors[" + std::to_string(m) + "]";
    check_dtype(op, item.c_str(), tensors[m], first.scalar_type());
    check_sizes(op, item.c_str(), tensors[m], first.sizes());
    check_device(op, item.c_str(), tensors[m], first.device());
  }
}

inline void check_selection(const char* op, const at::Tensor& selection, int64_t num_models,
                            int64_t width, at::Device device) {
  check_dtype(op, "selection", selection, at::kDouble);
  check_sizes(op, "selection", selection, {num_models, width});
  check_device(op, "selection", selection, device);
}

inline Mask mask_of(const char* op, std::string_view name) {
  if (name == "all") return Mask::kAll;
  if (name == "magnitude") return Mask::kMagnitude;
  if (name == "random") return Mask::kRandom;
  if (name == "band") return Mask::kBand;
  TORCH_CHECK_VALUE(false, op, ": expected mask to be all, magnitude, random or band, got ", name);
}

// The CPU's check of a random mask's [M, 2] selection; on the device a kernel asserts the same.
inline void check_probabilities(const char* op, Mask mask, const double* selection,
                                int64_t num_models) {
  if (mask != Mask::kRandom) return;
  for (int64_t m = 0; m < num_models; ++m)
    TORCH_CHECK_VALUE(selection[2 * m] >= 0 && selection[2 * m] <= 1, op,
                      ": expected selection[:, 0] to be keep probabilities in [0, 1], got ",
                      selection[2 * m], " for model ", m);
}

inline bool is_aligned(const at::Tensor& t) { return is_aligned(t.const_data_ptr()); }

// Contiguous copies where needed, and the addresses of all M tensors in a table.
class HostModels {
 public:
  explicit HostModels(at::TensorList tensors) {
    for (const at::Tensor& t : tensors) {
      held_.push_back(t.contiguous());
      pointers_.push_back(held_.back().const_data_ptr());
      aligned_ = aligned_ && is_aligned(held_.back());
    }
  }
  const void* const* pointers() const { return pointers_.data(); }
  bool aligned() const { return aligned_; }

 protected:
  std::vector<at::Tensor> held_;
  std::vector<const void*> pointers_;
  bool aligned_ = true;
};

// The same with the table on the models' device, followed there by `numbers`, [M] or nothing. The
// copy is ordered on the current stream; nothing waits for it.
class DeviceModels : public HostModels {
 public:
  DeviceModels(at::TensorList tensors, at::IntArrayRef numbers) : HostModels(tensors) {
    const auto count = int64_t(pointers_.size());
    const at::Tensor table =
        at::empty({count + int64_t(numbers.size())}, at::TensorOptions().dtype(at::kLong));
    auto* to = table.mutable_data_ptr<int64_t>();
    for (const void* pointer : pointers_) *to++ = reinterpret_cast<int64_t>(pointer);
    for (const int64_t number : numbers) *to++ = number;
    table_ = table.to(tensors.front().device(), /*non_blocking=*/true);
  }
  const void* const* pointers() const {
    return static_cast<const void* const*>(table_.const_data_ptr());
  }
  const int64_t* numbers() const {
    return table_.const_data_ptr<int64_t>() + int64_t(pointers_.size());
  }

 private:
  at::Tensor table_;
};

// The models' terms for the CPU loops; see task_vector.h. Without weights all are 1.
template <typename Acc>
std::vector<Term<Acc>> make_terms(const HostModels& models, int64_t num_models, Mask mask,
                                  const double* weights, const double* scales,
                                  const double* selection) {
  std::vector<Term<Acc>> terms;
  for (int64_t m = 0; m < num_models; ++m)
    terms.push_back(make_term<Acc>(models.pointers()[m], weights ? weights[m] : 1.0,
                                   scales ? scales[m] : 1.0, mask,
                                   selection + m * selection_width(mask)));
  return terms;
}

}  // namespace mergeme
