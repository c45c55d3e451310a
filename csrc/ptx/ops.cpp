// Every op on CPU tensors through nvcc's PTX: torch.ops.mergeme_ptx80 runs the text for sm_80,
// torch.ops.mergeme_ptx90 that for sm_90a. A call goes on to the op of the host shim, whose
// launches then go to the interpreter, once for every seed: results may not depend on it.
#include "csrc/ptx/ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "csrc/common/torch_glue.h"
#include "csrc/ptx/backend.h"

namespace mergeme::ptx {
namespace {

const std::vector<std::pair<std::string, Target>> kTargets = {{"mergeme_ptx80", {"sm_80", 80}},
                                                              {"mergeme_ptx90", {"sm_90a", 90}}};

constexpr size_t kGuard = 4096;
constexpr size_t kAlignment = 512;  // as torch's allocator for CUDA

thread_local std::shared_ptr<Memory> allocations;  // of the op call that this thread is in

// Memory that torch allocates in an op call: between guards that no kernel may touch, full of NaN
// patterns, known to the interpreter until it is freed.
class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!allocations) return outer->allocate(bytes);
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    const size_t whole = (bytes + 2 * kGuard + kAlignment - 1) / kAlignment * kAlignment;
    auto* begin = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, whole));
    TORCH_CHECK_WITH(OutOfMemoryError, begin, "ptx: out of memory for ", bytes, " bytes");
    std::memset(begin, 0xFF, whole);
    allocations->add(begin + kGuard, bytes, /*read_only=*/false,
                     "an allocation of " + std::to_string(bytes) + " bytes");
    return {begin + kGuard, new Piece{begin, allocations}, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return outer->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  c10::Allocator* outer = nullptr;

 private:
  struct Piece {
    unsigned char* begin;
    std::weak_ptr<Memory> memory;  // results outlive the call
  };
  static void release(void* context) {
    const std::unique_ptr<Piece> piece(static_cast<Piece*>(context));
    if (const auto memory = piece->memory.lock()) memory->remove(piece->begin + kGuard);
    std::free(piece->begin);
  }
};

class AllocatorScope {
 public:
  explicit AllocatorScope(std::shared_ptr<Memory> memory) {
    static GuardedAllocator allocator;
    outer_ = c10::GetCPUAllocator();
    allocator.outer = outer_;
    allocations = std::move(memory);
    c10::SetCPUAllocator(&allocator, kPriority);
  }
  ~AllocatorScope() {
    c10::SetCPUAllocator(outer_, kPriority);
    allocations.reset();
  }
  AllocatorScope(const AllocatorScope&) = delete;
  AllocatorScope& operator=(const AllocatorScope&) = delete;

 private:
  static constexpr uint8_t kPriority = 255;
  c10::Allocator* outer_;
};

// The bytes between a tensor's first and last element.
struct Extent {
  unsigned char* begin;
  size_t bytes;
};
Extent extent_of(const at::Tensor& t) {
  if (t.numel() == 0) return {nullptr, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {static_cast<unsigned char*>(const_cast<void*>(t.const_data_ptr())),
          static_cast<size_t>(last + 1) * t.element_size()};
}

// Tensors of an argument or a result: one, none or a list.
std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  if (value.isTensorList()) return value.toTensorVector();
  return {};
}

using Bytes = std::vector<unsigned char>;
Bytes bytes_of(const at::Tensor& t) {
  const Extent e = extent_of(t);
  return {e.begin, e.begin + e.bytes};
}

// One call of an op: its arguments, and what they may be.
class Call {
 public:
  Call(const c10::OperatorHandle& op, std::vector<c10::IValue> arguments)
      : name_(op.schema().name()),
        op_(name_.substr(name_.rfind(':') + 1)),
        arguments_(std::move(arguments)) {
    const auto& declared = op.schema().arguments();
    for (size_t i = 0; i < declared.size(); ++i) {
      const auto* alias = declared[i].alias_info();
      const bool written = alias && alias->isWrite();
      for (const at::Tensor& t : tensors_of(arguments_[i]))
        if (t.defined()) inputs_.push_back({t, declared[i].name(), written, {}});
    }
    for (Input& input : inputs_)
      if (input.written) input.before = bytes_of(input.tensor);
  }

  // What a run left: bytes of every result and of every argument that it may write.
  struct Outcome {
    std::vector<c10::IValue> results;
    std::vector<std::pair<std::string, Bytes>> bytes;
  };

  Outcome run(const Target& target, uint32_t seed) {
    const auto memory = std::make_shared<Memory>();
    for (const Input& input : inputs_) {
      const Extent e = extent_of(input.tensor);
      memory->add(e.begin, e.bytes, !input.written, input.name);
      if (input.written && e.bytes > 0) std::memcpy(e.begin, input.before.data(), e.bytes);
    }
    torch::jit::Stack stack(arguments_);
    {
      const Scope scope(op_, target, seed, memory);
      const AllocatorScope allocator(memory);
      shim().callBoxedForDispatchKey(c10::DispatchKey::CPU, stack);
    }
    Outcome out;
    for (size_t i = 0; i < stack.size(); ++i)
      for (const at::Tensor& t : tensors_of(stack[i]))
        out.bytes.emplace_back("result " + std::to_string(i), bytes_of(t));
    for (const Input& input : inputs_)
      if (input.written) out.bytes.emplace_back(input.name, bytes_of(input.tensor));
    out.results = std::move(stack);
    return out;
  }

  // Throws unless the two left the same bits.
  void compare(const Outcome& first, const Outcome& other, uint32_t first_seed,
               uint32_t seed) const {
    for (size_t i = 0; i < first.bytes.size(); ++i) {
      const auto& [what, expected] = first.bytes[i];
      const Bytes& got = other.bytes[i].second;
      size_t at = 0;
      while (at < expected.size() && at < got.size() && expected[at] == got[at]) ++at;
      TORCH_CHECK(expected.size() == got.size() && at == expected.size(), name_, ": expected ",
                  what, " to be the same for every seed, got a difference between seeds ",
                  first_seed, " and ", seed, " from byte ", at, " on");
    }
  }

 private:
  struct Input {
    at::Tensor tensor;
    std::string name;
    bool written;
    Bytes before;
  };

  c10::OperatorHandle shim() const {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("mergeme_simt::" + op_).c_str(), "");
  }

  std::string name_, op_;
  std::vector<c10::IValue> arguments_;
  std::vector<Input> inputs_;
};

template <size_t kTarget>
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static std::mutex one_call;  // launches of all threads go to where the scope sends them
  const std::lock_guard lock(one_call);
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto count = static_cast<std::ptrdiff_t>(op.schema().arguments().size());
  Call call(op, {stack->end() - count, stack->end()});
  const std::vector<uint32_t> seeds = settings().seeds;
  TORCH_CHECK(!seeds.empty(), "ptx: expected at least one seed");
  Call::Outcome first = call.run(kTargets[kTarget].second, seeds.front());
  for (size_t i = 1; i < seeds.size(); ++i)
    call.compare(first, call.run(kTargets[kTarget].second, seeds[i]), seeds.front(), seeds[i]);
  stack->erase(stack->end() - count, stack->end());
  stack->insert(stack->end(), first.results.begin(), first.results.end());
}

template <size_t kTarget>
torch::Library registered() {
  const std::string& name = kTargets[kTarget].first;
  torch::Library library(torch::Library::IMPL, name, c10::DispatchKey::CPU, __FILE__, __LINE__);
  for (const c10::OperatorName& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.getNamespace() == name)
      library.impl(op.name.substr(name.size() + 2).c_str(),
                   torch::CppFunction::makeFromBoxedFunction<&run<kTarget>>());
  return library;
}

}  // namespace

void register_ops() {
  static const torch::Library for_sm_80 = registered<0>(), for_sm_90a = registered<1>();
}

}  // namespace mergeme::ptx
