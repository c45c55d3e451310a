// Text for messages.
#pragma once
#include <cstdint>
#include <sstream>
#include <string>

namespace mergeme::ptx {

// Its arguments one after the other: concat("barrier ", 3, " is taken").
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::string hex(uint64_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

}  // namespace mergeme::ptx
