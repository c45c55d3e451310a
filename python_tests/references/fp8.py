"""FP8 numbers by the definition of the format, and their scales element by element."""

import math


def e4m3(byte):
    sign, exponent, fraction = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def e5m2(byte):
    sign, exponent, fraction = (-1) ** (byte >> 7), byte >> 2 & 31, byte & 3
    if exponent == 31:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * fraction / 4 * 2.0**-14
    return sign * (1 + fraction / 4) * 2.0 ** (exponent - 15)


def e8m0(byte):
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def dequantise(numbers, scale, block):
    """Lists of rows: number [i][j] times scale [i // block rows][j // block columns]."""
    return [
        [number * scale[i // block[0]][j // block[1]] for j, number in enumerate(row)]
        for i, row in enumerate(numbers)
    ]
