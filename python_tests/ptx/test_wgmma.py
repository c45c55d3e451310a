"""wgmma: every type, layout and swizzle against numpy; waits, fences and operands in flight."""

import numpy as np
import pytest

from python_tests.ptx.support import POISON, run, to_shared
from python_tests.ptx.test_mma import encode
from python_tests.support.ptx import VMError

RNG = np.random.default_rng(4)
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # the descriptor's number of each width in bytes
M = 64


def depth(kind):
    return 32 // BYTES[kind]


class Operand:
    """A matrix [mn, k] in shared memory as a descriptor describes it, and the descriptor."""

    def __init__(self, matrix, kind, mn_major=False, width=0):
        codes = encode(matrix, kind).astype({1: np.uint8, 2: np.uint16, 4: np.uint32}[BYTES[kind]])
        if mn_major:
            image, self.leading, self.stride = self.mn_major(codes.T.copy(), width)
        else:
            image, self.leading, self.stride = self.k_major(codes, width)
        self.image = np.pad(image, (0, -image.size % 1024))
        self.width = width

    def k_major(self, codes, width):
        """Rows of `width` bytes, eight of which are a core; without a swizzle cores of 8 x 16."""
        data = np.ascontiguousarray(codes).view(np.uint8)  # [mn, 32]
        rows = data.shape[0]
        if width == 0:
            cores = data.reshape(rows // 8, 8, 2, 16).transpose(0, 2, 1, 3)
            return cores.reshape(-1).copy(), 128, 256
        wide = np.zeros((rows, width), np.uint8)
        wide[:, :32] = data
        return exchange(wide.reshape(-1), width), 0, 8 * width

    def mn_major(self, codes, width):
        """codes [k, mn]: of each `width` bytes along MN eight rows along K are a core."""
        data = np.ascontiguousarray(codes).view(np.uint8)  # [16, 2 * mn]
        k, span = data.shape
        piece = width or 16
        if span % piece:
            data = np.pad(data, ((0, 0), (0, -span % piece)))
        pieces = data.shape[1] // piece
        cores = data.reshape(k // 8, 8, pieces, piece).transpose(2, 0, 1, 3)
        image = cores.reshape(-1).copy()  # [piece along MN, 8 along K, row, bytes]
        along_k, along_mn = 8 * piece, 8 * piece * (k // 8)
        if width == 0:
            return image, along_k, along_mn
        return exchange(image, width), along_mn, along_k

    def descriptor(self, offset=0):
        bits = offset >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        return bits | SWIZZLES[self.width] << 62


def exchange(image, width):
    """Units of 16 bytes change places by the bits of the address above them."""
    out = np.zeros(-(-image.size // 1024) * 1024, np.uint8)
    for at in range(0, image.size, 16):
        to = at ^ (at >> 3 & (width - 16))
        out[to : to + 16] = image[at : at + 16]
    return out


def registers_of_a(a, kind):
    """[128, 4]: lane l of warp w holds rows 16 w + l / 4 and 8 below."""
    per = 4 // BYTES[kind]
    codes = encode(a, kind).astype(np.uint32)
    out = np.zeros((128, 4), np.uint32)
    for t in range(128):
        lane, first = t % 32, t // 32 * 16
        for r in range(4):
            row = first + lane // 4 + 8 * (r % 2)
            for j in range(per):
                column = (lane % 4 + r // 2 * 4) * per + j
                out[t, r] |= np.uint32(int(codes[row, column]) << 8 * BYTES[kind] * j)
    return out


def places(n):
    """Row and column of accumulator x of thread t, as arrays [128, n / 2]."""
    t, x = np.arange(128)[:, None], np.arange(n // 2)[None]
    row = t // 32 * 16 + t % 32 // 4 + 8 * (x // 2 % 2)
    return row, x // 4 * 8 + t % 4 * 2 + x % 2


INPUTS = """
.shared .align 1024 .b8 sm[{bytes}];
{fill}
{fence_proxy}
bar.sync 0;
ld.global.u64 %q10, [%q1];
ld.global.u64 %q11, [%q1+8];
mov.u32 %r4, sm;
shr.u32 %r4, %r4, 4;
cvt.u64.u32 %q12, %r4;
add.u64 %q10, %q10, %q12;
add.u64 %q11, %q11, %q12;
.reg .{register} %c<{count}>;
.reg .b32 %a<4>;
mul.wide.u32 %q13, %r0, {row_bytes};
add.u64 %q13, %q13, %q2;
"""


class Product:
    """D = A B^T + C for one wgmma; A is [64, k] and B [n, k]."""

    def __init__(self, kind="bf16", out="f32", n=16, majors=(False, False), widths=(128, 128),
                 a_in_registers=False, scales=(1, 1)):  # fmt: skip
        k = depth(kind)
        low, high = {"u8": (0, 9), "e5m2": (-4, 5)}.get(kind, (-8, 9))
        self.a, self.b = RNG.integers(low, high, (M, k)), RNG.integers(low, high, (n, k))
        self.c = RNG.integers(-50, 50, (M, n))
        self.kind, self.out, self.n, self.in_registers = kind, out, n, a_in_registers
        self.fragments = registers_of_a(self.a, kind)
        a = Operand(self.a, kind, majors[0], widths[0])
        b = Operand(self.b, kind, majors[1], widths[1])
        self.image = np.concatenate([a.image, b.image])
        self.descriptors = np.array([a.descriptor(), b.descriptor(a.image.size)], np.uint64)
        self.packed = 2 if out == "f16" else 1
        self.count = n // 2 // self.packed
        names = ", ".join(f"%c{i}" for i in range(self.count))
        operand_a = "{%a0, %a1, %a2, %a3}" if a_in_registers else "%q10"
        tail = "1"
        if kind not in ("s8", "u8"):
            tail += f", {scales[0]}, {scales[1]}"
            if BYTES[kind] == 2:
                tail += "" if a_in_registers else f", {int(majors[0])}"
                tail += f", {int(majors[1])}"
        self.instruction = (
            f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{out}.{kind}.{kind} "
            f"{{{names}}}, {operand_a}, %q11, {tail};\n"
        )

    def expected(self):
        return self.a @ self.b.T + self.c

    def run(self, steps, block=128, fence_proxy="fence.proxy.async;", **options):
        register = "f32" if self.out == "f32" else "b32"
        row, column = places(self.n)
        values = encode(self.c, {"s32": "s32"}.get(self.out, self.out))[row, column]
        accumulators = values.astype(np.uint32)
        if self.packed == 2:
            accumulators = accumulators[:, ::2] | accumulators[:, 1::2] << np.uint32(16)
        text = INPUTS.format(
            bytes=self.image.size,
            fill=to_shared("%q0", "sm", self.image.nbytes),
            fence_proxy=fence_proxy,
            register=register,
            count=self.count,
            row_bytes=4 * self.count,
        )
        text += "".join(f"ld.global.{register} %c{i}, [%q13+{4 * i}];\n" for i in range(self.count))
        if self.in_registers:
            text += "add.u64 %q14, %q3, %q9;\n"
            text += "ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%q14];\n"
        text += steps.replace("MULTIPLY\n", self.instruction)
        text += "".join(f"st.global.{register} [%q13+{4 * i}], %c{i};\n" for i in range(self.count))
        arrays = (self.image, self.descriptors, accumulators, self.fragments)
        result = run(text, *arrays, block=block, **options)
        return self.unpack(result[2])

    def unpack(self, registers):
        row, column = places(self.n)
        if self.out == "f16":
            values = registers.view(np.float16).reshape(128, -1)
        else:
            values = registers.view(np.float32 if self.out == "f32" else np.int32)
        out = np.zeros((M, self.n))
        out[row, column] = values
        return out


WHOLE = """
wgmma.fence.sync.aligned;
MULTIPLY
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
"""

TYPES = [("f16", "f32"), ("f16", "f16"), ("bf16", "f32"), ("tf32", "f32"), ("e4m3", "f32")]
TYPES += [("e4m3", "f16"), ("e5m2", "f32"), ("s8", "s32"), ("u8", "s32")]


@pytest.mark.parametrize("width", SWIZZLES)
@pytest.mark.parametrize("kind, out", TYPES)
def test_types_and_swizzles(kind, out, width):
    p = Product(kind, out, widths=(width, width))
    np.testing.assert_array_equal(p.run(WHOLE), p.expected())


@pytest.mark.parametrize("n", [8, 24, 64, 104, 192, 256])
def test_widths(n):
    p = Product(n=n)
    np.testing.assert_array_equal(p.run(WHOLE), p.expected())


@pytest.mark.parametrize("width", SWIZZLES)
@pytest.mark.parametrize("majors", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("n", [64, 128])
def test_majors(kind, majors, width, n):
    p = Product(kind, n=n, majors=majors, widths=(width, width))
    np.testing.assert_array_equal(p.run(WHOLE), p.expected())


@pytest.mark.parametrize(
    "kind, out", [("bf16", "f32"), ("tf32", "f32"), ("e4m3", "f32"), ("s8", "s32")]
)
def test_a_in_registers(kind, out):
    p = Product(kind, out, a_in_registers=True)
    np.testing.assert_array_equal(p.run(WHOLE), p.expected())


@pytest.mark.parametrize("scales", [(-1, 1), (1, -1), (-1, -1)])
def test_negated_operands(scales):
    p = Product(scales=scales)
    expected = scales[0] * scales[1] * (p.a @ p.b.T) + p.c
    np.testing.assert_array_equal(p.run(WHOLE), expected)


@pytest.mark.parametrize("scale_d", ["0", "%p1"])
def test_without_the_old_accumulators(scale_d):
    p = Product()
    p.instruction = p.instruction.replace("%q11, 1,", f"%q11, {scale_d},")
    steps = "setp.ne.u32 %p1, 0, 0;\n" + WHOLE
    np.testing.assert_array_equal(p.run(steps), p.a @ p.b.T)


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_two_groups(seed):
    p = Product()
    steps = """
    wgmma.fence.sync.aligned;
    MULTIPLY
    MULTIPLY
    wgmma.commit_group.sync.aligned;
    MULTIPLY
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 1;
    wgmma.wait_group.sync.aligned 0;
    """
    np.testing.assert_array_equal(p.run(steps, seed=seed), 3 * (p.a @ p.b.T) + p.c)


MISSING_WAIT = [
    WHOLE.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"),
    WHOLE.replace("wgmma.wait_group.sync.aligned 0;", ""),
    WHOLE.replace("wgmma.commit_group.sync.aligned;", ""),
]


@pytest.mark.parametrize("steps", MISSING_WAIT, ids=["wait for older", "no wait", "no commit"])
def test_accumulators_are_poison_until_they_are_awaited(steps):
    got = Product().run(steps).astype(np.float32)
    assert (got.view(np.uint32) == POISON).all()


@pytest.mark.parametrize(
    "steps",
    [
        WHOLE.replace("wgmma.fence.sync.aligned;", ""),
        WHOLE.replace("MULTIPLY\n", "add.f32 %c3, %c3, %c3;\nMULTIPLY\n"),
        WHOLE + WHOLE.replace("wgmma.fence.sync.aligned;", ""),
    ],
    ids=["none", "too early", "none after the wait"],
)
def test_registers_need_a_fence(steps):
    with pytest.raises(VMError, match=r"missing wgmma\.fence"):
        Product().run(steps)


def test_registers_of_a_need_a_fence():
    with pytest.raises(VMError, match=r"missing wgmma\.fence"):
        steps = WHOLE.replace("MULTIPLY\n", "add.u32 %a1, %a1, 1;\nMULTIPLY\n")
        Product(a_in_registers=True).run(steps)


IN_FLIGHT = {
    "shared memory": (False, "st.shared.u32 [sm+16], %r0;"),
    "registers of A": (True, "mov.u32 %a2, 0;"),
}


@pytest.mark.parametrize("what", IN_FLIGHT)
def test_operands_may_not_change_in_flight(what):
    in_registers, change = IN_FLIGHT[what]
    p = Product(a_in_registers=in_registers)
    steps = WHOLE.replace("MULTIPLY\n", "MULTIPLY\nbar.sync 0;\n" + change + "\n")
    with pytest.raises(VMError, match="modified before it was waited for"):
        p.run(steps)
    p.run(WHOLE + change + "\n")


def test_accumulators_may_not_change_in_flight():
    change = "mov.f32 %c0, 0f00000000;"
    steps = WHOLE.replace("MULTIPLY\n", f"MULTIPLY\n{change}\nMULTIPLY\n")
    with pytest.raises(VMError, match="accumulator was changed"):
        Product().run(steps)


def test_ordinary_stores_need_the_proxy_fence():
    with pytest.raises(VMError, match=r"missing fence\.proxy\.async"):
        Product().run(WHOLE, fence_proxy="")
    with pytest.raises(VMError, match=r"missing fence\.proxy\.async"):
        Product().run(WHOLE, fence_proxy="setp.lt.u32 %p1, %r0, 100;\n@%p1 fence.proxy.async;")


def test_a_reader_may_fence_for_those_it_waited_for():
    p = Product()
    got = p.run("fence.proxy.async.shared::cta;\n" + WHOLE, fence_proxy="")
    np.testing.assert_array_equal(got, p.expected())


def test_part_of_a_warpgroup_is_a_deadlock():
    steps = "setp.ge.u32 %p1, %r0, 96;\n@%p1 bra SKIP;\n" + WHOLE + "SKIP:\nbar.sync 0;\n"
    with pytest.raises(VMError, match="deadlock"):
        Product().run(steps)


def test_part_of_a_warp_stops():
    steps = "setp.ge.u32 %p1, %r0, 100;\n@%p1 exit;\n" + WHOLE
    with pytest.raises(VMError, match="whole-warp"):
        Product().run(steps)


def test_a_descriptor_beyond_shared_memory_stops():
    p = Product()
    p.descriptors = p.descriptors + np.uint64(p.image.size >> 4)
    with pytest.raises(VMError, match="descriptor reaches outside shared memory"):
        p.run(WHOLE)


UNKNOWN = {  # shape, types, accumulators, majors
    "n": ("m64n12k16", "f32.bf16.bf16", 6, "0, 0"),
    "k": ("m64n8k8", "f32.bf16.bf16", 4, "0, 0"),
    "major": ("m64n8k32", "f32.e4m3.e4m3", 4, "0, 1"),
    "accumulators": ("m64n16k16", "f32.bf16.bf16", 4, "0, 0"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_shapes_that_do_not_exist_stop(what):
    shape, types, count, majors = UNKNOWN[what]
    names = ", ".join(f"%c{i}" for i in range(count))
    p = Product()
    p.instruction = (
        f"wgmma.mma_async.sync.aligned.{shape}.{types} {{{names}}}, %q10, %q11, 1, 1, 1, {majors};"
    )
    with pytest.raises(VMError, match="unknown or unsupported"):
        p.run(WHOLE)
