#include "csrc/common/bus_error.h"

#include <csignal>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace mergeme {

#if defined(__linux__)
namespace {

int code_of_exit = 1;

void say(const char* text, size_t length) {
  while (length > 0) {
    const ssize_t written = write(STDERR_FILENO, text, length);
    if (written <= 0) return;
    text += written;
    length -= static_cast<size_t>(written);
  }
}
void say(const char* text) { say(text, strlen(text)); }

const char* parse_hex(const char* at, const char* end, uintptr_t& value) {
  value = 0;
  for (; at < end; ++at) {
    const char c = *at;
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) break;
    value = value * 16 + static_cast<uintptr_t>(digit);
  }
  return at;
}

// Writes the path in a line of /proc/self/maps if `address` is in the line's range.
bool say_path(const char* line, const char* end, uintptr_t address) {
  uintptr_t first, last;
  const char* at = parse_hex(line, end, first);
  if (at == end || *at != '-') return false;
  parse_hex(at + 1, end, last);
  if (address < first || address >= last) return false;
  const void* slash = memchr(line, '/', static_cast<size_t>(end - line));
  if (slash == nullptr) return false;
  say(static_cast<const char*>(slash), static_cast<size_t>(end - static_cast<const char*>(slash)));
  return true;
}

// Only calls that are safe in a signal handler: open, read, write, _exit.
bool say_mapped_file(uintptr_t address) {
  const int file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  static char buffer[16384];
  size_t held = 0;
  bool found = false;
  while (!found) {
    const ssize_t count = read(file, buffer + held, sizeof(buffer) - held);
    if (count <= 0) break;
    held += static_cast<size_t>(count);
    const char* line = buffer;
    const char* const end = buffer + held;
    while (!found) {
      const void* newline = memchr(line, '\n', static_cast<size_t>(end - line));
      if (newline == nullptr) break;
      found = say_path(line, static_cast<const char*>(newline), address);
      line = static_cast<const char*>(newline) + 1;
    }
    held = static_cast<size_t>(end - line);
    if (held == sizeof(buffer)) held = 0;  // no line is this long
    memmove(buffer, line, held);
  }
  close(file);
  return found;
}

void handle(int, siginfo_t* info, void*) {
  say("mergeme: cannot read ");
  if (!say_mapped_file(reinterpret_cast<uintptr_t>(info->si_addr))) say("a mapped file");
  say(": disk error, or the file was cut short while in use\n");
  _exit(code_of_exit);
}

}  // namespace

void report_bus_errors(int exit_code) {
  code_of_exit = exit_code;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, nullptr);
}
#else
void report_bus_errors(int) {}
#endif

}  // namespace mergeme
