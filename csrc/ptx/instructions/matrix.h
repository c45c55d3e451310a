// What mma, wmma and wgmma share: elements of packed registers, and the product itself.
#pragma once
#include "csrc/ptx/instructions/floats.h"
#include "csrc/ptx/machine.h"

namespace mergeme::ptx {

// Bits of one element in a register of A or B.
int element_bits(Type type);

// Element k of a packed register, exact. tf32 is truncated to the bits it has.
double matrix_element(uint64_t bits, int k, Type type);

// An element of C or D, which is rounded from the sum in double once.
double accumulator_element(uint64_t bits, int k, Type type);
uint64_t encode_accumulator(double sum, Type type, bool satfinite);

// c[m][n] += a[m][k] * b[k][n], each sum in order of k. n is a multiple of 8, m of 4.
void multiply_add(double* c, const double* a, const double* b, int m, int n, int k);

// Reads the shape and the types (D, A, B, C, or three with D for C) that a mnemonic names.
bool decode_shape(const ParsedInstruction& parsed, MatrixMultiply& matrix);

}  // namespace mergeme::ptx
