// AMX in software, for tests on processors without it: the compiled tile instructions themselves
// run, each one caught where the processor finds it illegal. Test builds only.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mergeme::simt::host {

// From now on (or, with `on` false, no longer) a tile instruction that raises SIGILL is done in
// software, for every thread of the process: LDTILECFG, STTILECFG, TILERELEASE, TILEZERO,
// TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS and TDPFP16PS, as Intel's Software Developer's
// Manual defines them, volumes 1 (chapter 18) and 2. A wrong use (#UD, #GP) is named on stderr and
// then raises what it raises on hardware, SIGILL or SIGSEGV. Any other illegal instruction goes to
// the handler that was there before.
//
// Each thread has its own tiles. What cannot be seen here: speed, and tiles that a context switch
// or a signal handler loses. A processor that runs the instructions itself never comes here.
void emulate_amx(bool on);

// How many of each instruction were done in software so far, over all threads.
std::map<std::string, uint64_t> emulated_amx_instructions();

// One instruction, its tiles, and where in memory: see amx_programs.cpp.
struct AmxStep {
  std::string instruction;
  std::vector<int64_t> operands;
};

// Runs the instructions on a copy of `memory` and returns what they leave there.
std::vector<unsigned char> run_amx_program(const std::vector<AmxStep>& program,
                                           const std::vector<unsigned char>& memory);

}  // namespace mergeme::simt::host
