// The decoders of every group of instructions, in the order in which they are asked.
#pragma once
#include "csrc/ptx/decode.h"

namespace mergeme::ptx {

bool decode_move(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_load_store(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_address(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_integer(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_floating(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_half(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_comparison(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_conversion(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_atomic(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_copy_async(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_mbarrier(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_bulk_copy(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_tensor_copy(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_warp(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_matrix_load(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_mma(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_wmma(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_wgmma(const ParsedInstruction& parsed, Instruction& instruction);
bool decode_fence(const ParsedInstruction& parsed, Instruction& instruction);

inline constexpr Decoder kDecoders[] = {
    decode_move,     decode_load_store, decode_address,     decode_integer, decode_floating,
    decode_half,     decode_comparison, decode_conversion,  decode_atomic,  decode_copy_async,
    decode_mbarrier, decode_bulk_copy,  decode_tensor_copy, decode_warp,    decode_matrix_load,
    decode_mma,      decode_wmma,       decode_wgmma,       decode_fence};

}  // namespace mergeme::ptx
