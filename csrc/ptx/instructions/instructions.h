// The decoders of every group of instructions, in the order in which they are asked.
#pragma once
#include "csrc/ptx/decode.h"

namespace mergeme::ptx {

bool decode_warp(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_memory(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_arithmetic(const ParsedInstruction& parsed, Instruction& instruction);

inline constexpr Decoder kDecoders[] = {decode_warp, decode_memory, decode_arithmetic};

}  // namespace mergeme::ptx
