#include "csrc/ptx/backend.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace mergeme::ptx {
namespace {

namespace fs = std::filesystem;

// A schedule that differs from those of other seeds in the order of blocks and how many are alive.
void set_schedule(LaunchOptions& o, uint32_t seed) {
  constexpr std::array kOrders = {BlockOrder::kLinear, BlockOrder::kReverse, BlockOrder::kRandom};
  o.seed = seed;
  o.order = kOrders[seed % kOrders.size()];
  o.resident = 1 + 2 * static_cast<int32_t>(seed % 3);
}

// Where a kernel begins and ends, as offsets into the text.
struct Entry {
  std::string name;
  size_t begin, end;
};

std::string_view line_at(std::string_view text, size_t at) {
  const size_t end = text.find('\n', at);
  return text.substr(at, end == std::string_view::npos ? end : end + 1 - at);
}

int depth_change(std::string_view line) {
  int change = 0;
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"') quoted = !quoted;
    if (quoted) continue;
    if (line[i] == '/' && line.substr(i, 2) == "//") break;
    change += line[i] == '{' ? 1 : line[i] == '}' ? -1 : 0;
  }
  return change;
}

std::vector<Entry> entries_of(std::string_view text) {
  constexpr std::string_view kWord = ".entry";
  std::vector<Entry> entries;
  int depth = 0;
  bool inside = false, opened = false;  // in an entry; in its body
  for (size_t at = 0; at < text.size();) {
    const std::string_view line = line_at(text, at);
    const size_t word = depth == 0 && !inside ? line.find(kWord) : std::string_view::npos;
    if (word != std::string_view::npos && line.find("//") > word) {
      const size_t name = line.find_first_not_of(" \t", word + kWord.size());
      const size_t end = line.find_first_of("( \t\n", name);
      entries.push_back({std::string(line.substr(name, end - name)), at, at});
      inside = true, opened = false;
    }
    const int change = depth_change(line);
    depth += change;
    opened = opened || depth > 0 || line.starts_with("{");
    at += line.size();
    if (inside && opened && depth == 0) {
      entries.back().end = at;
      inside = false;
    }
  }
  if (inside) throw std::runtime_error("PTX: expected the end of kernel " + entries.back().name);
  return entries;
}

std::string cut(std::string_view text, const std::vector<Entry>& entries, std::string_view kernel) {
  std::string out;
  size_t from = 0;
  for (const Entry& e : entries) {
    if (e.name == kernel) continue;
    out += text.substr(from, e.begin - from);
    const std::string_view gone = text.substr(e.begin, e.end - e.begin);
    out.append(static_cast<size_t>(std::count(gone.begin(), gone.end(), '\n')), '\n');
    from = e.end;
  }
  return out += text.substr(from);
}

// One text, its kernels parsed when they are first launched.
class PtxFile {
 public:
  explicit PtxFile(std::string text) : text_(std::move(text)), entries_(entries_of(text_)) {}
  const std::string& text() const { return text_; }
  bool has(const std::string& kernel) const {
    return std::any_of(entries_.begin(), entries_.end(),
                       [&](const Entry& e) { return e.name == kernel; });
  }
  Module& module(const std::string& kernel) {
    auto& module = modules_[kernel];
    if (!module) module = std::make_unique<Module>(cut(text_, entries_, kernel));
    return *module;
  }

 private:
  std::string text_;
  std::vector<Entry> entries_;
  std::map<std::string, std::unique_ptr<Module>> modules_;
};

fs::path folder() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<const void*>(&built_ops), &info) || !info.dli_fname)
    throw std::runtime_error("ptx: expected to find the library that holds this function");
  return fs::path(info.dli_fname).parent_path() / "_ptx";
}

using Key = std::pair<std::string, std::string>;  // op, architecture

// Everything that is kept between launches.
struct Store {
  std::recursive_mutex mutex;
  std::map<Key, std::unique_ptr<PtxFile>> programs, overrides;
  std::map<const void*, std::string> names;
  std::vector<Record> records;
};
Store& store() {
  static Store store;
  return store;
}

// The op's program, or null if none was built.
PtxFile* find_program(const Key& key) {
  Store& s = store();
  if (const auto found = s.overrides.find(key); found != s.overrides.end())
    return found->second.get();
  auto& program = s.programs[key];
  if (!program) {
    std::ifstream file(folder() / (key.first + "." + key.second + ".ptx"));
    if (!file) return nullptr;
    std::ostringstream text;
    text << file.rdbuf();
    program = std::make_unique<PtxFile>(std::move(text).str());
  }
  return program.get();
}

// The folder in csrc/ops that an op belongs to: the longest that its name begins with.
std::string folder_of(const std::string& op, const std::vector<std::string>& folders) {
  std::string best;
  for (const std::string& name : folders)
    if (op.starts_with(name) && name.size() > best.size()) best = name;
  return best;
}

// The program with that kernel: the op's own if it has it, else that of an op whose launcher this
// one calls.
PtxFile& program_with(const std::string& kernel, const std::string& op,
                      const std::string& architecture) {
  std::vector<std::string> order = built_ops(architecture);
  if (order.empty())
    throw std::runtime_error("ptx: expected the ops' PTX for " + architecture + " in _ptx beside " +
                             "_simt: build with MERGEME_SIMT=1 where nvcc is found");
  const auto own = std::find(order.begin(), order.end(), folder_of(op, order));
  if (own != order.end()) std::rotate(order.begin(), own, own + 1);
  for (const std::string& name : order)
    if (PtxFile* program = find_program({name, architecture}); program && program->has(kernel))
      return *program;
  throw std::runtime_error("ptx: expected the PTX for " + architecture + " to hold kernel " +
                           kernel);
}

uint64_t count_in(const std::string& statistics, const std::string& name) {
  const size_t at = statistics.find("\"" + name + "\":");
  if (at == std::string::npos)
    throw std::runtime_error("ptx: expected the interpreter to count " + name);
  return std::strtoull(statistics.c_str() + at + name.size() + 3, nullptr, 10);
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

void Memory::add(const void* begin, uint64_t bytes, bool read_only, std::string name) {
  if (bytes == 0) return;
  const auto at = reinterpret_cast<uint64_t>(begin);
  const std::lock_guard lock(mutex_);
  pieces_.emplace(at, Buffer{at, bytes, read_only, std::move(name)});
}

void Memory::remove(const void* begin) {
  const std::lock_guard lock(mutex_);
  pieces_.erase(reinterpret_cast<uint64_t>(begin));
}

std::vector<Buffer> Memory::buffers() const {
  const std::lock_guard lock(mutex_);
  std::vector<Buffer> out;
  for (const auto& [begin, piece] : pieces_) {
    if (out.empty() || begin >= out.back().begin + out.back().bytes) {
      out.push_back(piece);
      continue;
    }
    Buffer& last = out.back();
    last.bytes = std::max(last.bytes, begin + piece.bytes - last.begin);
    last.read_only = last.read_only && piece.read_only;
    last.name += " and " + piece.name;
  }
  return out;
}

Scope::Scope(std::string op, Target target, uint32_t seed, std::shared_ptr<const Memory> memory)
    : op_(std::move(op)),
      target_(std::move(target)),
      seed_(seed),
      memory_(std::move(memory)),
      outer_(std::move(simt::host::run_elsewhere)),
      outer_capability_(simt::host::compute_capability) {
  target_.capability = settings().capability.value_or(target_.capability);
  simt::host::compute_capability = target_.capability;
  simt::host::run_elsewhere = [this](const simt::host::Launch& l) { launch(l); };
}

Scope::~Scope() {
  simt::host::run_elsewhere = std::move(outer_);
  simt::host::compute_capability = outer_capability_;
}

void Scope::launch(const simt::host::Launch& l) const {
  const std::lock_guard lock(store().mutex);
  const std::string name = kernel_name(l.kernel);
  Module& module = program_with(name, op_, target_.architecture).module(name);
  const auto three = [](dim3 d) {
    return std::array{static_cast<int32_t>(d.x), static_cast<int32_t>(d.y),
                      static_cast<int32_t>(d.z)};
  };
  LaunchOptions o{.grid = three(l.grid),
                  .block = three(l.block),
                  .cluster = {static_cast<int32_t>(l.cluster), 1, 1},
                  .shared_bytes = static_cast<uint32_t>(l.shared_bytes),
                  .statistics = settings().record,
                  .races = true,
                  .stop_at_race = true,
                  .profile = settings().record && settings().profile,
                  .max_seconds = settings().max_seconds};
  set_schedule(o, seed_);
  if (settings().max_grid > 0)
    for (int32_t& blocks : o.grid) blocks = std::min(blocks, settings().max_grid);
  const auto* parameters = static_cast<const unsigned char*>(l.params);
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string(l.name) + " (" + target_.architecture + ", seed " +
                             std::to_string(seed_) + "): " + what);
  };
  std::string statistics;
  try {
    statistics = module.launch(name, o, {parameters, l.params_bytes}, memory_->buffers());
  } catch (const std::exception& error) {
    refuse(error.what());
  }
  for (const char* hazard : {"shfl_undefined_reads", "barriers_with_exited_threads"})
    if (const uint64_t count = count_in(statistics, hazard); count > 0)
      refuse(std::string(hazard) + ": expected none, got " + std::to_string(count));
  if (settings().record)
    store().records.push_back({op_, l.name, module.kernels().front().readable, target_.architecture,
                               target_.capability, seed_, o.grid, o.block,
                               static_cast<int32_t>(l.cluster), l.shared_bytes,
                               std::move(statistics)});
}

std::vector<std::string> built_ops(const std::string& architecture) {
  const std::string ending = "." + architecture + ".ptx";
  std::vector<std::string> out;
  std::error_code missing;
  for (const auto& file : fs::directory_iterator(folder(), missing)) {
    const std::string name = file.path().filename().string();
    if (name.ends_with(ending)) out.push_back(name.substr(0, name.size() - ending.size()));
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::string text_of(const std::string& op, const std::string& architecture) {
  const std::lock_guard lock(store().mutex);
  const PtxFile* program = find_program({op, architecture});
  if (!program)
    throw std::runtime_error("ptx: expected PTX of " + op + " for " + architecture + " in _ptx");
  return program->text();
}

void override_text(const std::string& op, const std::string& architecture,
                   const std::string& text) {
  const std::lock_guard lock(store().mutex);
  if (text.empty())
    store().overrides.erase({op, architecture});
  else
    store().overrides[{op, architecture}] = std::make_unique<PtxFile>(text);
}

std::vector<Record> take_records() {
  const std::lock_guard lock(store().mutex);
  return std::exchange(store().records, {});
}

std::string kernel_name(const void* kernel) {
  const std::lock_guard lock(store().mutex);
  std::string& name = store().names[kernel];
  if (name.empty()) {
    Dl_info info{};
    if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel)
      throw std::runtime_error("ptx: expected every kernel to be a symbol of its own");
    name = info.dli_sname;
  }
  return name;
}

std::vector<std::string> kernel_names(const std::string& text) {
  std::vector<std::string> out;
  for (const Entry& e : entries_of(text)) out.push_back(e.name);
  return out;
}

std::string only_kernel(const std::string& text, const std::string& kernel) {
  return cut(text, entries_of(text), kernel);
}

}  // namespace mergeme::ptx
