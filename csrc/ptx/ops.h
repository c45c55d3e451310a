#pragma once

namespace mergeme::ptx {

// Gives the ops of torch.ops.mergeme_ptx80 and mergeme_ptx90, whose schemas are known by then,
// their kernels for CPU tensors.
void register_ops();

}  // namespace mergeme::ptx
