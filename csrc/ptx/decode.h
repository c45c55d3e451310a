// From parsed instructions to decoded ones.
#pragma once
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {

// Fills the handler, and whatever the handler needs, of the instructions a file knows. False leaves
// the instruction to the next decoder; what nobody knows stops the launch when it is reached, since
// a module may hold kernels for other machines.
using Decoder = bool (*)(const ParsedInstruction& parsed, Instruction& instruction);

}  // namespace mergeme::ptx
