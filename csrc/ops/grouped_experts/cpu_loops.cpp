#include "csrc/ops/grouped_experts/cpu_loops.h"

#include "csrc/common/grouped_loops.h"

namespace mergeme::grouped_experts {
namespace {

template <typename V>
MERGEME_INLINE V swiglu(V gate, V up) {
  return gate / (V{} + 1 + exp(-gate)) * up;
}

// W's rows alternate: half a step of gate rows, then the same columns' up rows, so that one pass
// over x gives both.
template <typename T>
void gate_up_block(const GateUpBlock& task, void* scratch) {
  using Acc = acc_t<T>;
  constexpr int64_t kHalf = kBroadcasts / 2;
  const GroupedBlock& block = task.block;
  const Buffers<Acc> buffers(scratch);
  const T* rows[kMaxBlockV];
  for (int64_t r = 0; r < block.rows; ++r)
    rows[r] = static_cast<const T*>(block.a) + task.slots[r] / task.top_k * block.lda;
  multiply_rows<T>(
      rows, block.rows, (block.columns + kHalf - 1) / kHalf * kBroadcasts, block.depth,
      [&](int64_t w) -> const T* {
        const int64_t column = w / kBroadcasts * kHalf + w % kHalf;
        if (column >= block.columns) return nullptr;
        const T* gate = static_cast<const T*>(block.b) + column * block.ldb;
        return w % kBroadcasts < kHalf ? gate : gate + task.up_offset;
      },
      buffers);
  const int64_t ldc = round_up(block.rows, kLanes<Acc>);
  store_transposed(static_cast<T*>(block.out), block.ldo, block.rows, block.columns,
                   [&](int64_t column, int64_t r) {
                     const int64_t w = column / kHalf * kBroadcasts + column % kHalf;
                     return swiglu(load(buffers.c + w * ldc + r),
                                   load(buffers.c + (w + kHalf) * ldc + r));
                   });
}

template <typename T>
void combine_tokens(const CombineTask& task, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  const Acc* expert_out = static_cast<const Acc*>(task.expert_out);
  for (int64_t t = begin; t < end; ++t) {
    const Acc* weights = static_cast<const Acc*>(task.weights) + t * task.top_k;
    const int32_t* inverse = task.inverse + t * task.top_k;
    T* out = static_cast<T*>(task.out) + t * task.hidden;
    for (int64_t h = 0; h < task.hidden; h += kWidth) {
      const int64_t some = smaller(kWidth, task.hidden - h);
      vector_t<Acc> sum = {};
      for (int64_t k = 0; k < task.top_k; ++k) {
        const Acc* from = expert_out + int64_t{inverse[k]} * task.hidden + h;
        sum = fma(broadcast(weights[k]), some == kWidth ? load(from) : load_some(from, some), sum);
      }
      if (some == kWidth)
        store(out + h, sum);
      else
        store_some(out + h, sum, some);
    }
  }
}

}  // namespace

namespace MERGEME_ISA {

void gate_up(const GateUpBlock& task, void* scratch) {
  dispatch_floating(task.block.dtype, [&]<typename T>() { gate_up_block<T>(task, scratch); });
}

void multiply_down(const GroupedBlock& block, void* scratch) {
  dispatch_floating(block.dtype,
                    [&]<typename T>() { multiply_nt_block<T, acc_t<T>>(block, scratch); });
}

void combine(const CombineTask& task, int64_t begin, int64_t end) {
  dispatch_floating(task.dtype, [&]<typename T>() { combine_tokens<T>(task, begin, end); });
}

}  // namespace MERGEME_ISA
}  // namespace mergeme::grouped_experts
