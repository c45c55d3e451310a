"""Kernels written by hand, for one instruction each, and values to run them on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from python_tests.ptx.formats import BY_NAME, NAN
from python_tests.support.ptx import Module

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"
COUNT = 512  # values for each form
THREADS = 128
POISON = 0x7FC07FC0  # what registers and shared memory hold before anything is written

WIDTHS = {"b8": 8, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}

REGISTERS = """
.reg .pred %p<16>;
.reg .b16 %h<16>;
.reg .b32 %r<128>;
.reg .b64 %q<32>;
.reg .f32 %f<160>;
.reg .f64 %d<16>;
"""


def entry(body: str, name="k", parameters=4, directives="") -> str:
    """A kernel of pointers p0, p1, ...: they are in %q0, %q1, ..., %r0 holds the thread's number,
    %r1 its lane, %q8 four times and %q9 sixteen times its number."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %q{i}, [p{i}];" for i in range(parameters))
    return f"""
.visible .entry {name}({declared}) {directives}
{{
{REGISTERS}
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %laneid;
mul.wide.u32 %q8, %r0, 4;
mul.wide.u32 %q9, %r0, 16;
{body}
ret;
}}
"""


def module(*entries: str) -> Module:
    return Module(HEADER + "".join(entries))


def run(body: str, *arrays: np.ndarray, block=32, declarations="", **options) -> list[np.ndarray]:
    """Runs a kernel on copies of the arrays; returns the copies and the statistics."""
    count = max(len(arrays), 1)
    m = Module(HEADER + declarations + entry(body, parameters=count))
    held = [m.alloc(a, f"p{i}") for i, a in enumerate(arrays)]
    arguments = held or [None]
    statistics = m.launch("k", options.pop("grid", 1), block, args=arguments, **options)
    return [*held, statistics]


@dataclass(frozen=True)
class Form:
    """One form of an instruction, its operands and its reference on Python integers."""

    instruction: str
    destination: str  # type of its register, or "pred"
    sources: tuple[str, ...]  # types of registers, or immediates such as "#8"
    expected: Callable
    values: tuple[str, ...] = ()  # kinds, see values(); integers if empty
    format: str = ""  # of floating-point results: NaNs of any payload are one
    packed: int = 1  # results in one register, lowest first
    text: str = ""  # instead of the plain "instruction d, a, b, c;"

    def __repr__(self):
        return self.instruction


def sign_extended(v: int, bits: int) -> int:
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> (bits - 1) else v


def each_half(reference: Callable) -> Callable:
    """Of an instruction on two packed 16-bit values."""
    return lambda *a: [reference(*[x & 0xFFFF for x in a]), reference(*[x >> 16 for x in a])]


def values(kind: str, width: int, rng: np.random.Generator) -> np.ndarray:
    """Bits of COUNT operands: "int", "small", "shift", "byte", a format's name, or with a suffix:
    "f32:near" of moderate size, "f32:wide" beyond every integer, "f16:pair" two in one register.
    """
    kind, _, variant = kind.partition(":")
    if kind == "shift":
        return rng.integers(0, 70, COUNT).astype(np.uint64)
    if kind == "byte":
        v = rng.integers(0, 40, COUNT)
        v[::7] = rng.integers(0, 256, v[::7].size)
        return v.astype(np.uint64)
    if kind == "small":  # many that are equal, some that are negative
        v = rng.integers(-1, 3, COUNT).astype(np.uint64)
        v[::5] = rng.integers(0, 1 << 63, v[::5].size)
        return v
    if kind == "int":
        v = rng.integers(0, 1 << 64, COUNT, dtype=np.uint64)
        v >>= (rng.integers(0, width, COUNT) * rng.integers(0, 2, COUNT)).astype(np.uint64)
        edges = np.array([0, 1, 2, 3, 128, 255, (1 << width) - 1, 1 << (width - 1)], np.uint64)
        v[: edges.size] = edges
        v[edges.size : 4 * edges.size] = rng.choice(edges, 3 * edges.size)
        return v
    if variant == "pair":
        low, high = values(kind, 16, rng), values(kind, 16, rng)
        return low & np.uint64(0xFFFF) | (high & np.uint64(0xFFFF)) << np.uint64(16)
    if variant:
        return _of_size(kind, 2 if variant == "near" else 40, rng)
    return _of_format(BY_NAME[kind], rng)


def _of_size(name: str, exponents: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(COUNT) * np.exp2(rng.integers(-14, exponents, COUNT))
    x[::9] = np.round(x[::9]) + 0.5  # ties
    if exponents > 2:
        x[:4] = [np.nan, np.inf, -np.inf, -0.0]
    with np.errstate(all="ignore"):
        narrow = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.float32}[name]
        v = x.astype(narrow)
    bits = v.view(f"u{v.itemsize}").astype(np.uint64)
    return bits >> np.uint64(16) if name == "bf16" else bits


def _of_format(f, rng: np.random.Generator) -> np.ndarray:
    """A quarter any bits, the rest near one, and every special value in every place."""
    span = min(f.bias - 1, 20)
    v = rng.integers(f.bias - span, f.bias + span, COUNT).astype(np.uint64)
    v = v << np.uint64(f.mantissa_bits) | rng.integers(0, 1 << f.mantissa_bits, COUNT, np.uint64)
    v |= rng.integers(0, 2, COUNT).astype(np.uint64) << np.uint64(f.bits - 1)
    v[: COUNT // 4] = rng.integers(0, 1 << f.bits, COUNT // 4, dtype=np.uint64)
    one, tiny = f.bias << f.mantissa_bits, 1 << f.mantissa_bits
    magnitudes = [0, 1, tiny - 1, tiny, one, f.largest, f.infinity, f.sign - 1]
    special = np.array(magnitudes + [f.sign | m for m in magnitudes], np.uint64)
    v[: 6 * special.size] = rng.choice(special, 6 * special.size)
    return v


def results(form: Form, columns: list[np.ndarray]) -> list[int]:
    """What the interpreter makes of the form: one integer for each row of operands."""
    registers, loads, operands = [], [], []
    for source in form.sources:
        if source.startswith("#"):
            operands.append(source[1:])
            continue
        name = "%" + "abcd"[len(loads)]
        registers.append(f".reg .{source} {name};")
        loads.append(f"ld.global.{source} {name}, [%q{len(loads)}];")
        operands.append(name)
    predicate = form.destination == "pred"
    registers.append(f".reg .{'b32' if predicate else form.destination} %x;")
    target = "%p0" if predicate else "%x"
    text = form.text or f"{form.instruction} {target}, {', '.join(operands)};"
    if predicate:
        text += "\nselp.u32 %x, 1, 0, %p0;"
    width = "b32" if predicate else form.destination
    last = len(columns)
    place = "\n".join(f"mad.wide.u32 %q{i}, %r4, 8, %q{i};" for i in range(last + 1))
    body = f"""
{" ".join(registers)}
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %ntid.x;
mad.lo.u32 %r4, %r2, %r3, %r0;
{place}
{" ".join(loads)}
{text}
st.global.{width} [%q{last}], %x;"""
    m = module(entry(body, parameters=last + 1))
    arrays = [m.alloc(c, readonly=True) for c in columns]
    out = m.alloc(np.zeros(COUNT, np.uint64))
    m.launch("k", COUNT // THREADS, THREADS, args=[*arrays, out])
    return [int(v) for v in out]


def check(form: Form) -> None:
    """Holds every result of the form to its reference, bit for bit."""
    rng = np.random.default_rng(sum(map(ord, form.instruction)))
    types = [s for s in form.sources if not s.startswith("#")]
    kinds = form.values or ("int",) * len(types)
    columns = []
    for kind, source in zip(kinds, types, strict=True):
        width = WIDTHS[source]
        columns.append(values(kind, width, rng) & np.uint64((1 << width) - 1))
    width = 1 if form.destination == "pred" else WIDTHS[form.destination]
    part = width // form.packed
    for row, got in enumerate(results(form, columns)):
        operands = [int(c[row]) for c in columns]
        expected = form.expected(*operands)
        expected = expected if isinstance(expected, list) else [expected]
        for i, want in enumerate(expected):
            bits = got >> (part * i) & ((1 << part) - 1)
            assert same(bits, want, part, form.format), (
                f"{form.instruction} of {[hex(v) for v in operands]}: result {i} is {bits:#x}, "
                f"expected {want if isinstance(want, str) else hex(int(want))}"
            )


def same(bits: int, want, width: int, name: str) -> bool:
    if isinstance(want, str) and want == NAN:
        return BY_NAME[name].is_nan(bits)
    want = int(want) & ((1 << width) - 1)
    if name and BY_NAME[name].is_nan(want):
        return BY_NAME[name].is_nan(bits)
    return bits == want


def to_shared(pointer: str, shared: str, count: int, label="IN") -> str:
    """All threads together store `count` bytes, a multiple of 4, at a global pointer to shared."""
    return _copy("ld.global.u32 %r12, [%q10];\nst.shared.u32 [%r11], %r12;", locals())


def from_shared(pointer: str, shared: str, count: int, label="OUT") -> str:
    """The way back."""
    return _copy("ld.shared.u32 %r12, [%r11];\nst.global.u32 [%q10], %r12;", locals())


def _copy(move: str, where: dict) -> str:
    return """
mov.u32 %r13, %ntid.x;
mul.lo.u32 %r13, %r13, 4;
mul.lo.u32 %r10, %r0, 4;
{label}_NEXT:
setp.ge.u32 %p9, %r10, {count};
@%p9 bra {label}_DONE;
mov.u32 %r11, {shared};
add.u32 %r11, %r11, %r10;
cvt.u64.u32 %q10, %r10;
add.u64 %q10, %q10, {pointer};
{move}
add.u32 %r10, %r10, %r13;
bra {label}_NEXT;
{label}_DONE:
""".format(move=move, **where)


def await_phase(barrier: str, parity=0, label="WAIT") -> str:
    """Spins until the phase of that parity is complete."""
    return f"""
{label}:
mbarrier.try_wait.parity.shared::cta.b64 %p10, [{barrier}], {parity};
@!%p10 bra {label};
"""


def first_thread(*lines: str) -> str:
    """The lines, executed by thread 0 alone."""
    return "setp.eq.u32 %p8, %r0, 0;\n" + "\n".join(f"@%p8 {line}" for line in lines) + "\n"
