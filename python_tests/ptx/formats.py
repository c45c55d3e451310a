"""Floating-point formats in exact rational arithmetic: what every rounded result must be."""

import math
from dataclasses import dataclass
from fractions import Fraction

NAN = "nan"  # any pattern that is not a number: payloads are not compared
MODES = ("rn", "rz", "rm", "rp")


@dataclass(frozen=True)
class Format:
    exponent_bits: int
    mantissa_bits: int
    infinities: bool = True  # e4m3 has none: its largest exponent holds numbers, and one NaN

    @property
    def bits(self):
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self):
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def sign(self):
        return 1 << (self.bits - 1)

    @property
    def infinity(self):
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def largest(self):
        return self.infinity - 1 if self.infinities else self.sign - 2

    def is_nan(self, bits):
        magnitude = bits & (self.sign - 1)
        return magnitude > (self.infinity if self.infinities else self.largest)

    def is_negative(self, bits):
        return bool(bits & self.sign)

    def decode(self, bits):
        """A Fraction; a float where it is infinite or not a number."""
        bits &= 2 * self.sign - 1
        if self.is_nan(bits):
            return math.nan
        sign = -1 if self.is_negative(bits) else 1
        magnitude = bits & (self.sign - 1)
        if self.infinities and magnitude == self.infinity:
            return sign * math.inf
        exponent, mantissa = divmod(magnitude, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        scale = max(exponent, 1) - self.bias - self.mantissa_bits
        return sign * mantissa * Fraction(2) ** scale

    def number(self, bits):
        """As a Python float, the sign of zero kept."""
        value = float(self.decode(bits))
        return math.copysign(value, -1.0) if value == 0 and self.is_negative(bits) else value

    def encode(self, x, mode="rn", saturate=False, negative_zero=False):
        """Bits of x rounded once; x is a Fraction, or a float that is infinite or not a number.

        A float zero keeps its sign; the sign of a Fraction that rounds to zero is its own, that of
        zero itself is `negative_zero`.
        """
        overflow_stays = saturate or not self.infinities
        if isinstance(x, float):
            if math.isnan(x):
                return NAN
            if math.isinf(x):
                magnitude = self.largest if overflow_stays else self.infinity
                return magnitude | (self.sign if x < 0 else 0)
            negative_zero = math.copysign(1, x) < 0
            x = Fraction(x)
        negative = x < 0 or (x == 0 and negative_zero)
        sign = self.sign if negative else 0
        if x == 0:
            return sign
        exponent = max(floor_log2(abs(x)), 1 - self.bias)
        steps = abs(x) / Fraction(2) ** (exponent - self.mantissa_bits)
        whole = steps.numerator // steps.denominator
        rest = steps - whole
        half = Fraction(1, 2)
        away = {
            "rn": rest > half or (rest == half and whole & 1),
            "rna": rest >= half,
            "rz": False,
            "rm": negative and rest > 0,
            "rp": not negative and rest > 0,
        }[mode]
        bits = ((exponent - (1 - self.bias)) << self.mantissa_bits) + whole + bool(away)
        if bits > self.largest:
            towards_zero = mode == "rz" or mode == ("rp" if negative else "rm")
            bits = self.largest if overflow_stays or towards_zero else self.infinity
        return sign | bits


def floor_log2(x):
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


F64 = Format(11, 52)
F32 = Format(8, 23)
TF32 = Format(8, 10)
F16 = Format(5, 10)
BF16 = Format(8, 7)
E5M2 = Format(5, 2)
E4M3 = Format(4, 3, infinities=False)
BY_NAME = {"f64": F64, "f32": F32, "f16": F16, "bf16": BF16, "e5m2": E5M2, "e4m3": E4M3}


def arithmetic(operation, f, mode="rn"):
    """The reference of add, sub, mul, div or fma in format f: bits in, bits of the rounded out."""

    def reference(*bits):
        numbers = [f.number(b) for b in bits]
        if not all(math.isfinite(x) for x in numbers):
            return f.encode(_of_infinities(operation, numbers))
        exact = [f.decode(b) for b in bits]
        negative = [f.is_negative(b) for b in bits]
        if operation == "div":
            if exact[1] == 0:
                quotient = math.nan if exact[0] == 0 else math.inf
                return f.encode(-quotient if negative[0] != negative[1] else quotient)
            return f.encode(exact[0] / exact[1], mode, negative_zero=negative[0] != negative[1])
        if operation == "mul":
            return f.encode(exact[0] * exact[1], mode, negative_zero=negative[0] != negative[1])
        if operation == "fma":
            first, first_negative = exact[0] * exact[1], negative[0] != negative[1]
        else:
            first, first_negative = exact[0], negative[0]
        second, second_negative = exact[-1], negative[-1] != (operation == "sub")
        total = first - second if operation == "sub" else first + second
        # A sum of zeros of one sign keeps it; any other sum that is zero is negative only in rm.
        if first == 0 and second == 0 and first_negative == second_negative:
            zero_negative = first_negative
        else:
            zero_negative = mode == "rm"
        return f.encode(total, mode, negative_zero=zero_negative)

    return reference


def _of_infinities(operation, x):
    """IEEE 754's result for operands of which one at least is infinite or not a number."""
    if any(math.isnan(v) for v in x):
        return math.nan
    if operation in ("mul", "div") or operation == "fma":
        a, b = x[0], x[1]
        sign = math.copysign(1, a) * math.copysign(1, b)
        if operation == "div":
            if math.isinf(a):
                return math.nan if math.isinf(b) else sign * math.inf
            return sign * 0.0
        if math.isinf(a) or math.isinf(b):
            product = math.nan if a == 0 or b == 0 else sign * math.inf
        else:
            product = sign * 0.0  # finite: whatever it is, the infinite addend decides
        return product + x[2] if operation == "fma" else product
    return x[0] - x[1] if operation == "sub" else x[0] + x[1]


def convert(source, destination, mode="rn", saturate=False, relu=False):
    """The reference of cvt between two formats."""

    def reference(bits):
        value = source.decode(bits)
        if isinstance(value, float) and math.isnan(value):
            return NAN
        if relu and (source.is_negative(bits) or value == 0):
            return 0
        return destination.encode(value, mode, saturate, negative_zero=source.is_negative(bits))

    return reference
