"""AMX as Intel's Software Developer's Manual defines it: plain loops over a list of instructions.

A program is a list of pairs (instruction, operands), as ``_simt.run_amx_program`` takes it.
"""

import math
import struct
from fractions import Fraction

import numpy as np

TILES, ROWS, ROW_BYTES = 8, 16, 64
SMALLEST = Fraction(1, 2**126)  # normal float32


def config(shapes, start_row=0):
    """The 64 bytes for LDTILECFG; ``shapes`` are (rows, bytes a row) of tmm0, tmm1, ..."""
    shapes = [*shapes, *[(0, 0)] * (TILES - len(shapes))]
    columns = struct.pack("<8H", *[c for _, c in shapes])
    rows = bytes(r for r, _ in shapes)
    return bytes([1, start_row]) + bytes(14) + columns + bytes(16) + rows + bytes(8)


def flush(x):
    return math.copysign(0.0, x) if 0 < abs(x) < SMALLEST else x


def round_to_float32(exact):
    """The float nearest to a non-zero fraction, ties to even; tiny results become zero."""
    quantum = Fraction(2) ** (math.floor(math.log2(abs(exact))) - 23)
    if abs(exact) >= quantum * 2**24:  # log2 was rounded
        quantum *= 2
    elif abs(exact) < quantum * 2**23:
        quantum /= 2
    rounded = round(exact / quantum) * quantum
    sign = 1.0 if exact > 0 else -1.0
    if abs(rounded) < SMALLEST:
        return sign * 0.0
    return float(rounded) if abs(rounded) < 2**128 else sign * math.inf


def fused(a, b, c):
    """a * b + c in float32, rounded once, denormals read and written as zero."""
    a, b, c = flush(a), flush(b), flush(c)
    if not all(map(math.isfinite, (a, b, c))):
        return math.nan if (math.isinf(a) and b == 0) or (a == 0 and math.isinf(b)) else a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return a * b + c if exact == 0 else round_to_float32(exact)  # the former for zero's sign


def halves(row, fp16):
    """The numbers of two bytes each in a row of a tile."""
    if fp16:
        return [float(x) for x in row.view(np.float16)]
    return [float(x) for x in (row.view(np.uint16).astype(np.uint32) << 16).view(np.float32)]


class Machine:
    def __init__(self, memory):
        self.memory = np.frombuffer(memory, np.uint8).copy()
        self.release()

    def release(self):
        self.configuration = bytes(64)
        self.tiles = np.zeros((TILES, ROWS, ROW_BYTES), np.uint8)

    def shape(self, tile):
        columns = struct.unpack_from("<8H", self.configuration, 16)[tile]
        return self.configuration[48 + tile], columns

    def take_start_row(self):
        row = self.configuration[1]
        self.configuration = bytes([self.configuration[0], 0]) + self.configuration[2:]
        return row

    def load_config(self, offset):
        self.release()
        new = self.memory[offset : offset + 64].tobytes()
        if new[0] != 0:
            self.configuration = new

    def store_config(self, offset):
        self.memory[offset : offset + 64] = np.frombuffer(self.configuration, np.uint8)

    def load(self, tile, offset, stride):
        rows, columns = self.shape(tile)
        start = self.take_start_row()
        self.tiles[tile, start:] = 0
        for row in range(start, rows):
            at = offset + row * stride
            self.tiles[tile, row, :columns] = self.memory[at : at + columns]

    def store(self, tile, offset, stride):
        rows, columns = self.shape(tile)
        for row in range(self.take_start_row(), rows):
            at = offset + row * stride
            self.memory[at : at + columns] = self.tiles[tile, row, :columns]

    def zero(self, tile):
        self.take_start_row()
        self.tiles[tile] = 0

    def dot(self, d, a, b, fp16):
        rows, columns = self.shape(d)
        depth = self.shape(a)[1] // 4
        result = np.zeros((ROWS, ROW_BYTES // 4), np.float32)
        right = [halves(self.tiles[b, k], fp16) for k in range(depth)]
        for m in range(rows):
            left = halves(self.tiles[a, m], fp16)
            old = self.tiles[d, m].view(np.float32)
            for n in range(columns // 4):
                even = odd = 0.0
                for k in range(depth):
                    even = fused(left[2 * k], right[k][2 * n], even)
                    odd = fused(left[2 * k + 1], right[k][2 * n + 1], odd)
                result[m, n] = fused(1.0, float(old[n]), fused(1.0, even, odd))
        self.take_start_row()
        self.tiles[d] = result.view(np.uint8)

    def run(self, program):
        """Runs it and returns the memory as it is then."""
        steps = {
            "ldtilecfg": self.load_config,
            "sttilecfg": self.store_config,
            "tilerelease": self.release,
            "tilezero": self.zero,
            "tileloadd": self.load,
            "tileloaddt1": self.load,
            "tilestored": self.store,
            "tdpbf16ps": lambda *tiles: self.dot(*tiles, fp16=False),
            "tdpfp16ps": lambda *tiles: self.dot(*tiles, fp16=True),
        }
        for name, operands in program:
            steps[name](*operands)
        return self.memory
