// What a launch is counted by. Counts of instructions live in the instructions themselves.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace mergeme::ptx {

// Sectors are 32 bytes; ideal is what the same bytes would need if they lay side by side.
struct GlobalTraffic {
  uint64_t requests = 0;
  uint64_t sectors = 0;
  uint64_t ideal_sectors = 0;
};

// A wavefront moves at most one word of each of the 32 banks.
struct SharedTraffic {
  uint64_t requests = 0;
  uint64_t wavefronts = 0;
  uint64_t ideal_wavefronts = 0;
};

// Copies by the bulk engine (TMA), in bytes; a multicast counts once for every block it reaches.
struct BulkTraffic {
  uint64_t copies = 0;
  uint64_t bytes_loaded = 0;
  uint64_t bytes_stored = 0;
};

struct Statistics {
  uint64_t blocks = 0;
  uint64_t warp_instructions = 0;
  GlobalTraffic global_load;
  GlobalTraffic global_store;
  SharedTraffic shared;
  BulkTraffic bulk;
  uint64_t global_bytes = 0;
  uint64_t barriers = 0;
  uint64_t fences = 0;
  uint64_t shfl_undefined_reads = 0;
  uint64_t barriers_with_exited_threads = 0;
  uint64_t races = 0;
  std::vector<std::string> race_examples;
};

}  // namespace mergeme::ptx
