"""Integer arithmetic, logic, shifts and bit fields, against Python's integers."""

import pytest

from python_tests.ptx.support import Form, check, sign_extended


def clamp(x, low, high):
    return max(low, min(high, x))


def saturated(x):
    return clamp(x, -(2**31), 2**31 - 1)


def divided(a, b):
    """Towards zero; all ones where b is zero, as GPUs do."""
    if b == 0:
        return -1
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def remainder(a, b):
    if b == 0:
        return a
    rest = abs(a) % abs(b)
    return -rest if a < 0 else rest


def arithmetic_forms(bits):
    r, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    mask = (1 << bits) - 1

    def signed(f):
        return lambda *a: f(*[sign_extended(x, bits) for x in a])

    two, three = (r, r), (r, r, r)
    return [
        Form(f"add.{u}", r, two, lambda a, b: a + b),
        Form(f"sub.{s}", r, two, lambda a, b: a - b),
        Form(f"mul.lo.{u}", r, two, lambda a, b: a * b),
        Form(f"mul.hi.{u}", r, two, lambda a, b: a * b >> bits),
        Form(f"mul.hi.{s}", r, two, signed(lambda a, b: a * b >> bits)),
        Form(f"mad.lo.{s}", r, three, lambda a, b, c: a * b + c),
        Form(f"mad.hi.{u}", r, three, lambda a, b, c: (a * b >> bits) + c),
        Form(f"mad.hi.{s}", r, three, signed(lambda a, b, c: (a * b >> bits) + c)),
        Form(f"div.{u}", r, two, lambda a, b: a // b if b else mask),
        Form(f"div.{s}", r, two, signed(divided)),
        Form(f"rem.{u}", r, two, lambda a, b: a % b if b else a),
        Form(f"rem.{s}", r, two, signed(remainder)),
        Form(f"min.{u}", r, two, min),
        Form(f"max.{u}", r, two, max),
        Form(f"min.{s}", r, two, signed(min)),
        Form(f"max.{s}", r, two, signed(max)),
        Form(f"abs.{s}", r, (r,), signed(abs)),
        Form(f"neg.{s}", r, (r,), lambda a: -a),
        Form(f"sad.{u}", r, three, lambda a, b, c: c + abs(a - b)),
        Form(f"sad.{s}", r, three, signed(lambda a, b, c: c + abs(a - b))),
    ]


def wide_forms(bits):
    r, wide = f"b{bits}", f"b{2 * bits}"

    def signed(f):
        return lambda a, b, *c: f(sign_extended(a, bits), sign_extended(b, bits), *c)

    return [
        Form(f"mul.wide.u{bits}", wide, (r, r), lambda a, b: a * b),
        Form(f"mul.wide.s{bits}", wide, (r, r), signed(lambda a, b: a * b)),
        Form(f"mad.wide.u{bits}", wide, (r, r, wide), lambda a, b, c: a * b + c),
        Form(f"mad.wide.s{bits}", wide, (r, r, wide), signed(lambda a, b, c: a * b + c)),
    ]


def logic_forms(bits):
    r, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    kinds = ("int", "shift")
    return [
        Form(f"and.{r}", r, (r, r), lambda a, b: a & b),
        Form(f"or.{r}", r, (r, r), lambda a, b: a | b),
        Form(f"xor.{r}", r, (r, r), lambda a, b: a ^ b),
        Form(f"not.{r}", r, (r,), lambda a: ~a),
        Form(f"cnot.{r}", r, (r,), lambda a: a == 0),
        Form(f"shl.{r}", r, (r, "b32"), lambda a, b: a << b, kinds),
        Form(f"shr.{u}", r, (r, "b32"), lambda a, b: a >> b, kinds),
        Form(f"shr.{s}", r, (r, "b32"), lambda a, b: sign_extended(a, bits) >> b, kinds),
    ]


def signed_field(a, position, length, bits):
    """bfe.s: beyond the highest bit a field repeats the sign."""
    if length == 0:
        return 0
    value = sign_extended(a, bits) >> min(position, bits - 1 if position >= bits else position)
    return sign_extended(value, length)


def bit_forms(bits):
    r, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    field = ("int", "byte", "byte")

    def highest(a):  # of a signed value: the highest bit that differs from the sign
        return (~a & ((1 << bits) - 1) if a >> (bits - 1) else a).bit_length() - 1

    def inserted(a, b, position, length):
        mask = ((1 << length) - 1) << position & ((1 << bits) - 1)
        return b & ~mask | a << position & mask

    return [
        Form(f"clz.{r}", "b32", (r,), lambda a: bits - a.bit_length()),
        Form(f"popc.{r}", "b32", (r,), int.bit_count),
        Form(f"brev.{r}", r, (r,), lambda a: int(f"{a:0{bits}b}"[::-1], 2)),
        Form(f"bfind.{u}", "b32", (r,), lambda a: a.bit_length() - 1),
        Form(f"bfind.{s}", "b32", (r,), highest),
        Form(f"bfind.shiftamt.{u}", "b32", (r,), lambda a: bits - a.bit_length() if a else -1),
        Form(
            f"bfe.{u}",
            r,
            (r, "b32", "b32"),
            lambda a, p, n: a >> (p & 255) & ((1 << (n & 255)) - 1),
            field,
        ),
        Form(
            f"bfe.{s}",
            r,
            (r, "b32", "b32"),
            lambda a, p, n: signed_field(a, p & 255, n & 255, bits),
            field,
        ),
        Form(
            f"bfi.{r}",
            r,
            (r, r, "b32", "b32"),
            lambda a, b, p, n: inserted(a, b, p & 255, n & 255),
            ("int", *field),
        ),
    ]


def permuted(a, b, selector):
    pool = [v >> 8 * i & 255 for v in (a, b) for i in range(4)]
    result = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = pool[choice & 7]
        if choice & 8:  # the byte's sign, eight times
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


PERMUTE_MODES = {  # the selectors of the manual's table, for control 0 to 3
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def looked_up(table):
    def reference(a, b, c):
        result = 0
        for i in range(32):
            index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
            result |= (table >> index & 1) << i
        return result

    return reference


def funnel(left, limit):
    def reference(low, high, amount):
        amount = min(amount, 32) if limit == "clamp" else amount & 31
        both = high << 32 | low
        return both << amount >> 32 if left else both >> amount

    return reference


def dot(a_signed, b_signed, count, half=0):
    """dp4a, and dp2a of two 16-bit with the lower or upper two 8-bit values."""

    def element(x, i, width, is_signed):
        x = x >> width * i & ((1 << width) - 1)
        return sign_extended(x, width) if is_signed else x

    def reference(a, b, c):
        for i in range(count):
            c += element(a, i, 32 // count, a_signed) * element(b, i + 2 * half, 8, b_signed)
        return c

    return reference


def nth_set(mask, base, offset):
    """fns: the |offset|-th set bit from base on, upwards if offset is positive."""
    base, offset = base & 31, sign_extended(offset, 32)
    if offset == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    upwards = range(base, 32) if offset > 0 else range(base, -1, -1)
    found = [i for i in upwards if mask >> i & 1]
    return found[abs(offset) - 1] if abs(offset) <= len(found) else 0xFFFFFFFF


def word_forms():
    two, three = ("b32", "b32"), ("b32", "b32", "b32")
    shifted = ("int", "int", "shift")
    forms = [
        Form("mul24.lo.u32", "b32", two, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
        Form("mul24.hi.u32", "b32", two, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16),
        Form(
            "mul24.hi.s32",
            "b32",
            two,
            lambda a, b: sign_extended(a, 24) * sign_extended(b, 24) >> 16,
        ),
        Form(
            "mad24.lo.s32",
            "b32",
            three,
            lambda a, b, c: sign_extended(a, 24) * sign_extended(b, 24) + c,
        ),
        Form(
            "add.sat.s32",
            "b32",
            two,
            lambda a, b: saturated(sign_extended(a, 32) + sign_extended(b, 32)),
        ),
        Form(
            "sub.sat.s32",
            "b32",
            two,
            lambda a, b: saturated(sign_extended(a, 32) - sign_extended(b, 32)),
        ),
        Form(
            "max.relu.s32",
            "b32",
            two,
            lambda a, b: max(0, sign_extended(a, 32), sign_extended(b, 32)),
        ),
        Form(
            "min.relu.s32",
            "b32",
            two,
            lambda a, b: max(0, min(sign_extended(a, 32), sign_extended(b, 32))),
        ),
        Form("prmt.b32", "b32", three, permuted),
        Form("dp4a.s32.u32", "b32", three, dot(True, False, 4)),
        Form("dp4a.u32.s32", "b32", three, dot(False, True, 4)),
        Form("dp2a.lo.s32.s32", "b32", three, dot(True, True, 2)),
        Form("dp2a.hi.u32.s32", "b32", three, dot(False, True, 2, half=1)),
        Form(
            "fns.b32",
            "b32",
            three,
            nth_set,
            ("int", "byte", "small"),
            text="and.b32 %b, %b, 31;\nfns.b32 %x, %a, %b, %c;",
        ),
        Form("bmsk.clamp.b32", "b32", two, lambda a, b: (1 << min(b, 32)) - 1 << min(a, 32), BYTES),
        Form("bmsk.wrap.b32", "b32", two, lambda a, b: (1 << (b & 31)) - 1 << (a & 31), BYTES),
        Form("szext.wrap.u32", "b32", two, lambda a, n: a & (1 << (n & 31)) - 1, ("int", "byte")),
        Form(
            "szext.clamp.s32",
            "b32",
            two,
            lambda a, n: sign_extended(a, min(n, 32)) if n else 0,
            ("int", "byte"),
        ),
    ]
    forms += [
        Form(
            f"prmt.b32.{mode}",
            "b32",
            three,
            lambda a, b, c, s=selectors: permuted(a, b, s[c & 3]),
        )
        for mode, selectors in PERMUTE_MODES.items()
    ]
    forms += [
        Form(f"lop3.b32 {table:#x}", "b32", three, looked_up(table), text=LOOKUP.format(table))
        for table in (0x96, 0xE8, 0xCA, 0x1B, 0x80, 0x00, 0xFF)
    ]
    return forms + [
        Form(f"shf.{side}.{limit}.b32", "b32", three, funnel(side == "l", limit), shifted)
        for side in "lr"
        for limit in ("wrap", "clamp")
    ]


BYTES = ("byte", "byte")
LOOKUP = "lop3.b32 %x, %a, %b, %c, {};"


def carry_forms():
    """The carry of one instruction, seen through the next: c + c + carry, c - c - borrow."""
    forms = []
    for bits in (32, 64):
        r, u = f"b{bits}", f"u{bits}"
        text = "{0} %x, {1};\n{2} %x, %c, %c;"
        three = (r, r, r)
        forms += [
            Form(
                f"add.cc.{u}",
                r,
                three,
                lambda a, b, c, n=bits: c + c + (a + b >> n),
                text=text.format(f"add.cc.{u}", "%a, %b", f"addc.{u}"),
            ),
            Form(
                f"sub.cc.{u}",
                r,
                three,
                lambda a, b, c: -1 if a < b else 0,
                text=text.format(f"sub.cc.{u}", "%a, %b", f"subc.{u}"),
            ),
            Form(
                f"mad.lo.cc.{u}",
                r,
                three,
                lambda a, b, c, n=bits: c + c + ((a * b & (1 << n) - 1) + c >> n),
                text=text.format(f"mad.lo.cc.{u}", "%a, %b, %c", f"addc.{u}"),
            ),
            Form(
                f"madc.hi.{u}",
                r,
                three,
                lambda a, b, c, n=bits: (a * b >> n) + c + (a + b >> n),
                text=f"add.cc.{u} %x, %a, %b;\nmadc.hi.{u} %x, %a, %b, %c;",
            ),
        ]
    return forms


def packed_forms():
    def halves(f, is_signed):
        def reference(a, b):
            pairs = [(a >> 16 * i & 0xFFFF, b >> 16 * i & 0xFFFF) for i in range(2)]
            if is_signed:
                pairs = [(sign_extended(x, 16), sign_extended(y, 16)) for x, y in pairs]
            return [f(x, y) for x, y in pairs]

        return reference

    def relu(f):
        return lambda a, b: max(0, f(a, b))

    two = ("b32", "b32")
    return [
        Form("add.u16x2", "b32", two, halves(lambda a, b: a + b, False), packed=2),
        Form("min.u16x2", "b32", two, halves(min, False), packed=2),
        Form("max.s16x2", "b32", two, halves(max, True), packed=2),
        Form("min.relu.s16x2", "b32", two, halves(relu(min), True), packed=2),
    ]


FORMS = [f for bits in (16, 32, 64) for f in arithmetic_forms(bits) + logic_forms(bits)]
FORMS += [f for bits in (16, 32) for f in wide_forms(bits)]
FORMS += [f for bits in (32, 64) for f in bit_forms(bits)]
FORMS += word_forms() + carry_forms() + packed_forms()


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_integer_instruction(form):
    check(form)
