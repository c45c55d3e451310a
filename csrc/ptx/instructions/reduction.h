// The read-modify-write operations, which atomics and bulk reductions share.
#pragma once
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {

// The operation a mnemonic names, if it names one.
bool decode_reduction(const ParsedInstruction& parsed, Reduction& reduction);

// The new value of one element, in the lower bits. `other` is the value of .cas to be stored.
uint64_t reduce(Reduction reduction, Type type, uint64_t old, uint64_t operand, uint64_t other);

// The same in memory, where an element lies at each address.
void reduce_in_place(Reduction reduction, Type type, uint8_t* to, const uint8_t* operand);

}  // namespace mergeme::ptx
