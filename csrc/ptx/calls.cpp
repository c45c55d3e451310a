// Calls of device functions, returns, and the end of threads.
#include "csrc/ptx/machine.h"
#include "csrc/ptx/messages.h"

namespace mergeme::ptx {
namespace {

constexpr size_t kMaxCallDepth = 60;
constexpr uint64_t kPoisonRegister = uint64_t{kPoison} << 32 | kPoison;

uint64_t round_up16(uint64_t value) { return (value + 15) & ~uint64_t{15}; }

// Argument k of a call, of one lane: from the call's .param variable, or from a register.
uint64_t argument(const Warp& warp, const Instruction& call, int k, int lane, size_t bytes) {
  const Operand& operand = call.elements[static_cast<size_t>(call.immediate + k)];
  if (operand.kind != OperandKind::kSymbol) return row(warp, operand)[lane];
  const Frame& frame = *warp.frames.back();
  uint64_t value = 0;
  std::memcpy(&value, &frame.params[lane * frame.param_bytes() + operand.index], bytes);
  return value;
}

std::string text_at(const Launch& launch, uint64_t address) {
  constexpr size_t kLongest = 500;
  for (const MemoryRange& range : launch.ranges) {
    if (address < range.begin || address >= range.end) continue;
    const auto* text = reinterpret_cast<const char*>(address);
    return std::string(text, strnlen(text, std::min(range.end - address, kLongest)));
  }
  return "?";
}

// What printf() would print: integers and strings, no flags. The list of values lies at a generic
// address in the thread's local memory, each at a multiple of its size.
std::string printed_text(const Warp& warp, int lane, const std::string& format, uint64_t list) {
  std::string text;
  uint64_t offset = 0;
  const auto next = [&](uint64_t bytes) {
    offset = (offset + bytes - 1) / bytes * bytes;
    const uint64_t from = list + offset;
    offset += bytes;
    const uint64_t begin = reinterpret_cast<uint64_t>(warp.local_memory) +
                           static_cast<uint64_t>(lane) * warp.local_bytes;
    uint64_t value = 0;
    if (from >= begin && from + bytes <= begin + warp.local_bytes)
      std::memcpy(&value, reinterpret_cast<const void*>(from), bytes);
    return value;
  };
  for (size_t i = 0; i < format.size(); i++) {
    if (format[i] != '%' || i + 1 == format.size()) {
      text += format[i];
      continue;
    }
    bool is_long = false;
    for (i++; i + 1 < format.size() && format[i] == 'l'; i++) is_long = true;
    switch (format[i]) {
      case 's':
        text += text_at(*warp.launch, next(8));
        break;
      case 'd':
        text += is_long ? std::to_string(static_cast<int64_t>(next(8)))
                        : std::to_string(static_cast<int32_t>(next(4)));
        break;
      case 'u':
        text += std::to_string(next(is_long ? 8 : 4));
        break;
      case '%':
        text += '%';
        break;
      default:
        return text + "...";
    }
  }
  while (text.ends_with('\n')) text.pop_back();
  return text;
}

// assert() and printf() are calls of functions that only the driver has.
bool call_of_driver(Warp& warp, const Instruction& call, const Function& callee, uint32_t lanes) {
  const int lane = std::countr_zero(lanes);
  if (callee.name == "__assertfail") {
    const auto text = [&](int k) {
      return text_at(*warp.launch, argument(warp, call, k, lane, sizeof(uint64_t)));
    };
    warp.fail(call, lane,
              concat("device assertion failed: ", text(0), ", file ", text(1), ", line ",
                     argument(warp, call, 2, lane, sizeof(uint32_t)), ", function ", text(3)));
  }
  if (callee.name != "vprintf") return false;
  const std::string format = text_at(*warp.launch, argument(warp, call, 0, lane, sizeof(uint64_t)));
  warp.launch->last_printed =
      printed_text(warp, lane, format, argument(warp, call, 1, lane, sizeof(uint64_t)));
  Frame& frame = *warp.frames.back();  // prints nothing, and says so
  for (int k = 0; k < call.immediate; k++) {
    const Operand& result = call.elements[static_cast<size_t>(k)];
    if (result.kind != OperandKind::kSymbol) continue;
    for_each_lane(lanes, [&](int l) {
      std::memset(&frame.params[l * frame.param_bytes() + result.index], 0, sizeof(uint32_t));
    });
  }
  warp.pc++;
  return true;
}

Function& called_function(Warp& warp, const Instruction& call, uint32_t lanes) {
  if (call.callee) return *call.callee;
  const uint64_t* targets = row(warp, call.operands[0]);
  const int first = std::countr_zero(lanes);
  for_each_lane(lanes, [&](int lane) {
    if (targets[lane] != targets[first])
      warp.fail(call, lane, "divergent indirect call is not supported");
  });
  const uint64_t number = targets[first] - kFunctionBase;
  if (number >= warp.launch->program->functions.size())
    warp.fail(call, first, "indirect call of something that is not a function");
  return *warp.launch->program->functions[number];
}

std::unique_ptr<Frame> new_frame(Warp& warp, Function& function) {
  std::unique_ptr<Frame> frame;
  if (warp.spare_frames.empty()) {
    frame = std::make_unique<Frame>();
  } else {  // saves the allocations
    frame = std::move(warp.spare_frames.back());
    warp.spare_frames.pop_back();
  }
  frame->function = &function;
  frame->registers.assign(static_cast<size_t>(function.num_registers() + kSinkRows) * kWarpSize,
                          kPoisonRegister);
  frame->predicates.assign(static_cast<size_t>(function.num_predicates) + 1, 0);
  frame->params.assign(round_up16(function.param_bytes + 16) * kWarpSize, 0);
  frame->pc.fill(0);
  frame->waiting = 0;
  frame->at_barrier = 0;
  return frame;
}

}  // namespace

void Warp::call(const Instruction& instruction, uint32_t lanes) {
  const int first = std::countr_zero(lanes);
  Function& callee = called_function(*this, instruction, lanes);
  if (!callee.has_body) {
    if (call_of_driver(*this, instruction, callee, lanes)) return;
    fail(instruction, first, "call of an external function " + callee.name);
  }
  if (frames.size() > kMaxCallDepth) fail(instruction, first, "calls nest too deeply");
  launch->program->decode(callee);
  Frame& caller = *frames.back();
  std::unique_ptr<Frame> frame = new_frame(*this, callee);
  frame->mask = lanes;
  frame->called_by = lanes;
  frame->call = &instruction;
  frame->local_base = round_up16(caller.local_base + caller.function->local_bytes);
  if (frame->local_base + callee.local_bytes > local_bytes)
    fail(instruction, first, "device-function stack is too small");
  const size_t num_arguments =
      std::min(callee.parameters.size(),
               instruction.elements.size() - static_cast<size_t>(instruction.immediate));
  for (size_t k = 0; k < num_arguments; k++) {
    const FunctionParameter& parameter = callee.parameters[k];
    const Operand& operand = instruction.elements[static_cast<size_t>(instruction.immediate) + k];
    for_each_lane(lanes, [&](int lane) {
      uint8_t* to = &frame->params[lane * frame->param_bytes() + parameter.offset];
      if (operand.kind == OperandKind::kSymbol)
        std::memcpy(to, &caller.params[lane * caller.param_bytes() + operand.index],
                    static_cast<size_t>(parameter.size));
      else
        std::memcpy(to, &row(*this, operand)[lane],
                    static_cast<size_t>(std::min(8, parameter.size)));
    });
  }
  leave_group(pc + 1);
  frames.push_back(std::move(frame));
  enter_frame();
}

void Warp::return_from_call(uint32_t lanes) {
  Frame& frame = *frames.back();
  frame.mask &= ~lanes;
  mask &= ~lanes;
  if (frames.size() == 1) {
    exit(lanes);
    return;
  }
  if (frame.mask) {
    has_group = mask != 0;
    return;
  }
  // The last lanes are back: results go to where the call wants them.
  std::unique_ptr<Frame> done = std::move(frames.back());
  frames.pop_back();
  Frame& caller = *frames.back();
  const Instruction& instruction = *done->call;
  const size_t num_results =
      std::min(done->function->results.size(), static_cast<size_t>(instruction.immediate));
  for (size_t k = 0; k < num_results; k++) {
    const FunctionParameter& result = done->function->results[k];
    const Operand& operand = instruction.elements[k];
    for_each_lane(done->called_by & caller.mask, [&](int lane) {
      const uint8_t* from = &done->params[lane * done->param_bytes() + result.offset];
      if (operand.kind == OperandKind::kSymbol) {
        std::memcpy(&caller.params[lane * caller.param_bytes() + operand.index], from,
                    static_cast<size_t>(result.size));
      } else {
        uint64_t& to = caller.registers[static_cast<size_t>(operand.index) * kWarpSize + lane];
        to = 0;
        std::memcpy(&to, from, static_cast<size_t>(std::min(8, result.size)));
      }
    });
  }
  spare_frames.push_back(std::move(done));
  has_group = false;
  mask = 0;
  enter_frame();
}

void Warp::exit(uint32_t lanes) {
  current = nullptr;
  for_each_lane(lanes, [&](int lane) {  // asynchronous copies outlive their thread
    land_async_copies(lane, ~uint64_t{0}, ~uint64_t{0});
    land_bulk_stores(lane, ~uint64_t{0}, false);
  });
  alive &= ~lanes;
  for (const std::unique_ptr<Frame>& frame : frames) frame->mask &= ~lanes;
  Frame& frame = *frames.back();
  // Lanes that wait for the rest of the warp look again: there is less to wait for.
  frame.waiting &= frame.at_barrier & ~lanes;
  mask &= ~lanes;
  has_group = mask != 0;
  launch->progress++;
  if (frames.size() > 1 && frame.mask == 0) return_from_call(0);
}

}  // namespace mergeme::ptx
