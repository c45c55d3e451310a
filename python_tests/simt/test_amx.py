"""The tile instructions, as compiled, against plain loops (python_tests/references/amx.py).

On a processor with AMX these are its own; elsewhere csrc/simt/host/amx.cpp does them.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext import _simt
from python_tests.references import amx

pytestmark = pytest.mark.skipif(
    not (platform.machine() == "x86_64" and sys.platform == "linux"), reason="x86-64 Linux"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def emulated():
    _simt.emulate_amx()
    yield
    _simt.emulate_amx(False)


def both(program, memory):
    """The memory after the real instructions, and after the loops."""
    ours = _simt.run_amx_program([*program, ("tilerelease", [])], bytes(memory))
    return np.frombuffer(ours, np.uint8), amx.Machine(bytes(memory)).run(program)


def as_floats(memory):
    """Bits, with every NaN the same one: the manual leaves its sign and payload open."""
    bits = np.frombuffer(memory.tobytes(), np.uint32).copy()
    bits[np.isnan(bits.view(np.float32))] = 0x7FC00000
    return bits


def random_bytes(seed, size):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


DATA = 64  # memory: a configuration, then data


def program_memory(shapes, size, start_row=0, seed=0):
    return amx.config(shapes, start_row) + random_bytes(seed, size)


@pytest.mark.parametrize("tile", range(8))
@pytest.mark.parametrize("load", ["tileloadd", "tileloaddt1"])
def test_load_and_store_move_configured_bytes_only(tile, load):
    shapes = [(1 + (tile + i) * 5 % 16, 1 + (tile + i) * 7 % 64) for i in range(8)]
    program = [("ldtilecfg", [0])]
    program += [(load, [i, DATA + 11 * i, 67 + i]) for i in range(8)]
    program += [("tilezero", [(tile + 1) % 8]), ("tilestored", [tile, 4000, 96])]
    program += [("tilestored", [(tile + 1) % 8, 6000, 64])]
    memory = program_memory(shapes, 8000, seed=tile)
    np.testing.assert_array_equal(*both(program, memory))


def test_a_new_configuration_clears_the_tiles():
    memory = program_memory([(16, 64)] * 8, 4096)
    program = [("ldtilecfg", [0]), ("tileloadd", [3, DATA, 64]), ("ldtilecfg", [0])]
    program += [("tilestored", [3, DATA + 2048, 64])]
    ours, loops = both(program, memory)
    np.testing.assert_array_equal(ours, loops)
    assert not ours[DATA + 2048 : DATA + 3072].any()


@pytest.mark.parametrize("start_row", [0, 1, 7, 15])
def test_start_row_resumes_a_load_and_a_store(start_row):
    shapes = [(16, 64)] * 8
    memory = program_memory(shapes, 8192, start_row)
    for program in (
        [("tileloadd", [2, DATA, 64]), ("sttilecfg", [DATA + 4096])],
        [("tilestored", [2, DATA, 64]), ("sttilecfg", [DATA + 4096])],
        [("tilezero", [2]), ("sttilecfg", [DATA + 4096])],
        [("sttilecfg", [DATA + 4096])],
    ):
        program = [("ldtilecfg", [0]), *program, ("tilestored", [2, DATA + 5000, 128])]
        np.testing.assert_array_equal(*both(program, memory))


def test_configuration_is_stored_as_loaded_and_as_zeros_after_release():
    shapes = [(1 + i, 4 + 5 * i) for i in range(8)]
    memory = program_memory(shapes, 512, start_row=9)
    program = [("ldtilecfg", [0]), ("sttilecfg", [128]), ("tilerelease", []), ("sttilecfg", [192])]
    ours, loops = both(program, memory)
    np.testing.assert_array_equal(ours, loops)
    assert bytes(ours[128:192]) == memory[:64] and not ours[192:256].any()


def test_palette_zero_releases_whatever_else_it_says():
    memory = amx.config([(2, 8)]) + bytes([0, 99]) + random_bytes(1, 62) + bytes(64)
    program = [("ldtilecfg", [0]), ("ldtilecfg", [64]), ("sttilecfg", [128])]
    assert not both(program, memory)[0][128:].any()


ADDRESSES = 18


@pytest.mark.parametrize("form", range(ADDRESSES))
def test_every_form_of_address(form):
    stride = 0 if form == ADDRESSES - 2 else 64
    start_row = int(form == ADDRESSES - 1)
    shapes = [(2 if start_row else 16, 40)] * 8
    memory = program_memory(shapes, 4096, start_row, seed=form)
    store = ("tilestored", [3, DATA + 2048, 64])
    program = [("ldtilecfg", [0]), ("tileloadd address", [form, DATA, stride]), store]
    ours = _simt.run_amx_program([*program, ("tilerelease", [])], memory)
    # Without a base the address is the stride: it starts, at row 1, at the data's first row.
    at = DATA - 64 if start_row else DATA
    program[1] = ("tileloadd", [3, at, 64 if start_row else stride])
    assert ours == amx.Machine(memory).run(program).tobytes()


def test_every_form_of_address_of_a_configuration():
    memory = program_memory([(2, 4), (16, 64)], 1024)
    program = [("ldtilecfg indexed", [0]), ("sttilecfg indexed", [DATA + 64])]
    program += [("ldtilecfg constant", []), ("sttilecfg", [DATA + 128])]
    ours = _simt.run_amx_program([*program, ("tilerelease", [])], memory)
    assert ours[DATA + 64 : DATA + 128] == memory[:64]
    shapes = [(3, 8)] + [(0, 0)] * 6 + [(16, 64)]
    assert ours[DATA + 128 : DATA + 192] == amx.config(shapes)


# Tiles for products: C [rows, columns], A [rows, depth pairs], B [depth pairs, columns].
A_AT, B_AT, C_AT = 64, 64 + 1024, 64 + 2048


def product(name, shape, a, b, c, tiles=(0, 1, 2)):
    rows, depth, columns = shape
    shapes = [(1, 4)] * 8
    for tile, size in zip(
        tiles, [(rows, 4 * columns), (rows, 4 * depth), (depth, 4 * columns)], strict=True
    ):
        shapes[tile] = size
    memory = bytearray(amx.config(shapes) + bytes(3 * 1024))
    for at, x in ((A_AT, a), (B_AT, b), (C_AT, c)):
        data = np.ascontiguousarray(x).view(np.uint8).tobytes()
        memory[at : at + len(data)] = data
    d, left, right = tiles
    program = [
        ("ldtilecfg", [0]),
        ("tileloadd", [d, C_AT, 4 * columns]),
        ("tileloadd", [left, A_AT, 4 * depth]),
        ("tileloaddt1", [right, B_AT, 4 * columns]),
        (name, list(tiles)),
        ("tilestored", [d, C_AT, 4 * columns]),
    ]
    ours, loops = both(program, memory)
    return as_floats(ours), as_floats(loops)


def halves(rng, name, shape, spread):
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
    dtype = torch.bfloat16 if name == "tdpbf16ps" else torch.float16
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy()


NAMES = ["tdpbf16ps", "tdpfp16ps"]
SHAPES = [(16, 16, 16), (1, 1, 1), (3, 2, 5), (16, 1, 16), (1, 16, 16), (13, 16, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_product_rounds_as_the_manual_says(name, shape):
    rng = np.random.default_rng(sum(shape))
    rows, depth, columns = shape
    for spread in (0, 12):
        a = halves(rng, name, (rows, 2 * depth), spread)
        b = halves(rng, name, (depth, 2 * columns), spread)
        c = rng.standard_normal((rows, columns)).astype(np.float32)
        np.testing.assert_array_equal(*product(name, shape, a, b, c))


@pytest.mark.parametrize("name", NAMES)
def test_product_takes_every_three_tiles(name):
    rng = np.random.default_rng(0)
    for d in range(8):
        for a in range(8):
            for b in range(8):
                if len({d, a, b}) == 3:
                    data = (halves(rng, name, (1, 2), 0) for _ in range(2))
                    c = np.ones((1, 1), np.float32)
                    np.testing.assert_array_equal(*product(name, (1, 1, 1), *data, c, (d, a, b)))


# bf16: zeros, infinities, NaN, ordinary, the least normal, denormals, the greatest.
SPECIAL = [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x3F80, 0xBF81, 0x0080, 0x8081, 1, 0x807F, 0x7F7F]
SPECIAL_FP16 = [0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x3C00, 0xBC01, 0x0400, 1, 0x83FF, 0x7BFF]
SPECIAL_FP32 = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00800000, 1, 0x807FFFFF]
SPECIAL_FP32 += [0x7F7FFFFF, 0x3F800000, 0x80800001]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_product_of_special_numbers(data, name):
    special = SPECIAL if name == "tdpbf16ps" else SPECIAL_FP16
    anything = st.integers(0, 0xFFFF)

    def draw(values, shape, dtype):
        size = int(np.prod(shape))
        drawn = data.draw(st.lists(values, min_size=size, max_size=size))
        return np.array(drawn, dtype).reshape(shape)

    a = draw(st.sampled_from(special) | anything, (2, 4), np.uint16)
    b = draw(st.sampled_from(special) | anything, (2, 6), np.uint16)
    c = draw(st.sampled_from(SPECIAL_FP32) | st.integers(0, 2**32 - 1), (2, 3), np.uint32)
    np.testing.assert_array_equal(*product(name, (2, 2, 3), a, b, c))


@pytest.mark.parametrize("power", range(14, 28))
def test_tiny_sums_are_flushed_after_rounding(power):
    """Just below the least normal number, m (1 - 2^-power): rounded to m, or else flushed."""
    least = np.float32(2.0**-126)
    numbers = torch.tensor([1.0, 2.0**-100, 2.0**-126, -(2.0 ** -(26 + power))]).bfloat16()
    one, factor, first, second = numbers.view(torch.int16).numpy()
    a = np.array([[one, 0, factor, 0]], np.int16)
    b = np.array([[first, 0], [second, 0]], np.int16)
    ours, loops = product("tdpbf16ps", (1, 2, 1), a, b, np.zeros((1, 1), np.float32))
    np.testing.assert_array_equal(ours, loops)
    # The 24-bit number below m is m (1 - 2^-24); from halfway between, it rounds to m.
    assert ours[C_AT // 4 :].view(np.float32)[0] == (least if power >= 25 else 0)


def test_rounding_mode_is_neither_read_nor_written():
    rng = np.random.default_rng(3)
    a, b = halves(rng, "tdpbf16ps", (4, 32), 9), halves(rng, "tdpbf16ps", (16, 8), 9)
    c = rng.standard_normal((4, 4)).astype(np.float32)
    shapes = [(4, 16), (4, 64), (16, 16)]
    data = amx.config(shapes) + a.tobytes() + b.tobytes() + c.tobytes() + bytes(64)
    c_at = 64 + a.nbytes + b.nbytes
    program = [
        ("ldtilecfg", [0]),
        ("tileloadd", [0, c_at, 16]),
        ("tileloadd", [1, 64, 64]),
        ("tileloadd", [2, 64 + a.nbytes, 16]),
        ("tdpbf16ps", [0, 1, 2]),
        ("tilestored", [0, c_at, 16]),
    ]
    expected = _simt.run_amx_program(program, data)
    for csr in (0x3F80, 0x5F80, 0x7F80, 0xFFC0):  # down, up, towards zero; flushing
        around = [("set mxcsr", [csr]), *program, ("get mxcsr", [c_at + 64])]
        around += [("set mxcsr", [0x1F80]), ("tilerelease", [])]
        got = _simt.run_amx_program(around, data)
        assert got[: c_at + 64] == expected[: c_at + 64]
        assert int.from_bytes(got[c_at + 64 : c_at + 68], "little") == csr


def test_each_thread_has_its_own_tiles():
    failures = []

    def work(seed):
        memory = program_memory([(16, 64)] * 8, 4096, seed=seed)
        program = [("ldtilecfg", [0]), ("tileloadd", [5, DATA, 64])]
        program += [("tilestored", [5, DATA + 2048, 64]), ("tilezero", [5])] * 50
        program += [("tileloadd", [5, DATA, 64]), ("tilestored", [5, DATA + 2048, 64])]
        ours, loops = both(program, memory)
        if not np.array_equal(ours, loops):
            failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    x = torch.randn(64, 64)
    for _ in range(50):  # torch's own threads go on meanwhile
        x = torch.relu(x @ x.T / 64)
    for thread in threads:
        thread.join()
    assert not failures and torch.isfinite(x).all()


def spoiled(at, value):
    memory = bytearray(amx.config([(16, 64)] * 8))
    memory[at] = value
    return bytes(memory)


LOAD = ("ldtilecfg", [0])
GOOD = amx.config([(16, 64)] * 8)
ODD = amx.config([(2, 8), (2, 12), (2, 8), (0, 0), (2, 6), (2, 4), (1, 6), (3, 8)])
# Program, memory, signal, what is said.
FAULTS = {
    "palette": ([LOAD], spoiled(0, 2), signal.SIGSEGV, "ldtilecfg (tmm0): palette 2 does not"),
    "reserved": ([LOAD], spoiled(9, 7), signal.SIGSEGV, "byte 9 is reserved and holds 7"),
    "reserved columns": ([LOAD], spoiled(32, 1), signal.SIGSEGV, "byte 32 is reserved"),
    "reserved rows": ([LOAD], spoiled(63, 1), signal.SIGSEGV, "byte 63 is reserved"),
    "rows": ([LOAD], spoiled(50, 17), signal.SIGSEGV, "tmm2 cannot have 17 rows of 64 bytes"),
    "columns": ([LOAD], spoiled(18, 65), signal.SIGSEGV, "tmm1 cannot have 16 rows of 65 bytes"),
    "no rows": ([LOAD], spoiled(48, 0), signal.SIGSEGV, "tmm0 cannot have 0 rows of 64 bytes"),
    "no columns": ([LOAD], spoiled(16, 0), signal.SIGSEGV, "tmm0 cannot have 16 rows of 0 bytes"),
    "not configured": ([("tilezero", [4])], GOOD, signal.SIGILL, "tilezero (tmm4): the tiles are"),
    "released": (
        [LOAD, ("tilerelease", []), ("tdpbf16ps", [0, 1, 2])],
        GOOD,
        signal.SIGILL,
        "tdpbf16ps (tmm0): the tiles are not configured (#UD)",
    ),
    "empty tile": ([LOAD, ("tileloadd", [3, 0, 0])], ODD, signal.SIGILL, "tmm3 is configured with"),
    "empty source": ([LOAD, ("tdpbf16ps", [0, 3, 2])], ODD, signal.SIGILL, "tmm3 is configured"),
    "same as first": ([LOAD, ("tdpbf16ps", [1, 1, 2])], GOOD, signal.SIGILL, "tiles must differ"),
    "same as second": ([LOAD, ("tdpfp16ps", [1, 2, 1])], GOOD, signal.SIGILL, "tiles must differ"),
    "same sources": ([LOAD, ("tdpbf16ps", [0, 2, 2])], GOOD, signal.SIGILL, "tiles must differ"),
    "odd row": ([LOAD, ("tdpbf16ps", [0, 4, 2])], ODD, signal.SIGILL, "multiples of 4"),
    "depth": ([LOAD, ("tdpbf16ps", [0, 1, 2])], ODD, signal.SIGILL, "(2, 8) += (2, 12) x (2, 8)"),
    "row count": ([LOAD, ("tdpbf16ps", [2, 7, 0])], ODD, signal.SIGILL, "do not fit"),
    "another": ([LOAD, ("tdpbssd", [])], GOOD, signal.SIGILL, ""),
    "ud2": ([("ud2", [])], GOOD, signal.SIGILL, ""),
}
RUN_EACH = """
import json, os, sys, torch
from mergeme_ext import _simt
from python_tests.simt.test_amx import FAULTS

_simt.emulate_amx()
results = {}
for name, (program, memory, _, _) in FAULTS.items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        _simt.run_amx_program(program, memory)
        os._exit(0)
    os.close(write)
    said = os.read(read, 4096).decode()
    results[name] = (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def faults():
    """What became of each program of FAULTS: its child's exit code and standard error."""
    command = [sys.executable, "-c", RUN_EACH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    "amx" in __import__("mergeme_ext")._load._C.build_info()["cpu_available"],
    reason="the processor's own instructions say nothing",
)
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_use_is_named_and_ends_as_on_hardware(name, faults):
    _, _, ends, text = FAULTS[name]
    code, said = faults[name]
    assert code == -ends
    assert text in said if text else said == ""


@pytest.mark.slow
def test_other_illegal_instructions_reach_the_handler_before():
    code = """
import faulthandler, sys, torch
from mergeme_ext import _simt
faulthandler.enable()
_simt.emulate_amx()
_simt.run_amx_program([("ud2", [])], b"")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGILL
    assert "Fatal Python error: Illegal instruction" in done.stderr


def test_unknown_instructions_are_refused():
    with pytest.raises(ValueError, match="expected an instruction's name, got tilesum"):
        _simt.run_amx_program([("tilesum", [])], b"")


def test_what_was_emulated_is_counted():
    if "amx" in os.environ.get("MERGEME_CPU_ISA", ""):
        pytest.skip("tiles may be the processor's own")
    before = _simt.emulated_amx_instructions()
    both([("ldtilecfg", [0]), ("tilezero", [1]), ("tilezero", [1])], GOOD)
    after = _simt.emulated_amx_instructions()
    new = {k: after[k] - before[k] for k in after if after[k] != before[k]}
    assert new in ({"ldtilecfg": 1, "tilezero": 2, "tilerelease": 1}, {})
