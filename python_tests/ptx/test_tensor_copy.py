"""cp.async.bulk.tensor against numpy: boxes, bounds, swizzles, both ways; rules of tensor maps."""

import numpy as np
import pytest

from python_tests.ptx.support import (
    POISON,
    await_phase,
    entry,
    first_thread,
    from_shared,
    module,
    to_shared,
)
from python_tests.support.ptx import VMError, bf16, tensor_map

SHARED = ".shared .align 1024 .b8 sm[32768];\n.shared .align 8 .b64 bar;\n"
LOAD = (
    "cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[sm], [%q0, {{{at}}}], [bar];"
)
STORE = "cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%q0, {{{at}}}], [sm];"
REDUCE = (
    "cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group "
    "[%q0, {{{at}}}], [sm];"
)
FINISH = ("cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;")


def at(coordinates):
    """Registers with the coordinates, and the instructions that set them."""
    names = [f"%r{40 + k}" for k in range(len(coordinates))]
    moves = "".join(f"mov.s32 {n}, {c};\n" for n, c in zip(names, coordinates, strict=True))
    return ", ".join(names), moves


def load(array, box, coordinates, bytes_, wait=True, **map_options):
    """The shared memory after a load, as bytes."""
    names, moves = at(coordinates)
    rank = len(box)
    text = SHARED + moves + first_thread("mbarrier.init.shared::cta.b64 [bar], 1;")
    text += "bar.sync 0;\n" + first_thread(
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {bytes_};",
        LOAD.format(rank=rank, at=names),
    )
    text += await_phase("bar") if wait else ""
    shown = -(-bytes_ // 1024) * 1024
    text += from_shared("%q1", "sm", shown)
    m = module(entry(text, parameters=2))
    tensor = m.alloc(array, "tensor", readonly=True)
    held = map_of(m, tensor, box, **map_options)
    out = m.alloc(np.zeros(shown, np.uint8))
    m.launch("k", 1, 64, args=[held, out])
    return out


def map_of(m, tensor, box, dims=None, strides=None, **options):
    dims = dims or tensor.shape[::-1]
    strides = strides or tensor.strides[-2::-1]
    raw = tensor_map(tensor, dims, strides, box, **{"fmt": "u16", **options})
    return m.alloc(np.frombuffer(raw, np.uint8), "map")


def store(instruction, image, array, box, coordinates, fence="fence.proxy.async;", **options):
    names, moves = at(coordinates)
    text = SHARED + moves + to_shared("%q1", "sm", image.nbytes) + fence + "\nbar.sync 0;\n"
    text += first_thread(instruction.format(rank=len(box), at=names), *FINISH)
    m = module(entry(text, parameters=2))
    tensor = m.alloc(array, "tensor")
    held = map_of(m, tensor, box, **options)
    m.launch("k", 1, 64, args=[held, m.alloc(image)])
    return tensor


def boxed(array, box, coordinates, fill=0, steps=None):
    """The box cut out of the array, elements outside replaced; and where each came from."""
    steps = steps or (1,) * len(box)
    shape = tuple(-(-b // s) for b, s in zip(box, steps, strict=True))[::-1]
    out = np.full(shape, fill, array.dtype)
    places = {}
    for index in np.ndindex(*shape):
        source = tuple(
            c + i * s for c, i, s in zip(coordinates[::-1], index, steps[::-1], strict=True)
        )
        if all(0 <= s < n for s, n in zip(source, array.shape, strict=True)):
            out[index] = array[source]
            places[index] = source
    return out, places


def swizzled(data, width):
    """Bytes as they lie in shared memory: units of 16 exchanged within rows of 128 bytes."""
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    image = np.zeros(-(-data.size // 1024) * 1024, np.uint8)
    for unit in range(0, data.size, 16):
        row, chunk = divmod(unit // 16, 8)
        chunk ^= row % 8 & {0: 0, 32: 1, 64: 3, 128: 7}[width]
        image[row * 128 + chunk * 16 :][:16] = data[unit : unit + 16]
    return image


CASES = [  # array shape from the outermost dimension in; box and coordinates from the innermost
    ((104,), (32,), (80,)),
    ((20, 64), (64, 8), (0, 15)),
    ((20, 40), (16, 8), (-3, 5)),
    ((20, 40), (16, 8), (32, -2)),
    ((7, 9, 32), (16, 4, 3), (8, 2, 5)),
    ((3, 4, 5, 16), (8, 2, 3, 2), (4, 1, 2, 2)),
    ((2, 3, 4, 3, 16), (8, 2, 2, 2, 2), (8, 2, 1, 2, 1)),
]


def numbers(shape, dtype=np.uint16):
    return np.random.default_rng(1).integers(0, 2**16, shape).astype(dtype)


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("shape, box, coordinates", CASES)
def test_load(shape, box, coordinates, width):
    if width and box[0] * 2 > width:
        pytest.skip("the box is wider than the swizzle")
    array = numbers(shape)
    expected, _ = boxed(array, box, coordinates)
    image = swizzled(expected, width)
    got = load(array, box, coordinates, expected.nbytes, swizzle=width)
    written = swizzled(np.ones_like(expected, np.uint8).repeat(2), width).astype(bool)
    np.testing.assert_array_equal(got[written], image[written])
    assert (got[~written].view(np.uint16) != 0).all(), "poison is left where nothing was copied"


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("shape, box, coordinates", CASES)
def test_store_leaves_out_what_is_outside(shape, box, coordinates, width):
    if width and box[0] * 2 > width:
        pytest.skip("the box is wider than the swizzle")
    data, array = numbers(box[::-1]), np.zeros(shape, np.uint16)
    expected = array.copy()
    for index, place in boxed(array, box, coordinates)[1].items():
        expected[place] = data[index]
    got = store(STORE, swizzled(data, width), array, box, coordinates, swizzle=width)
    np.testing.assert_array_equal(got, expected)


def test_reduction():
    data = np.arange(64, dtype=np.uint32).reshape(8, 8)
    array = np.full((10, 8), 100, np.uint32)
    got = store(REDUCE, swizzled(data, 0), array, (8, 8), (0, 4), fmt="u32")
    expected = array.copy()
    expected[4:] += data[:6]
    np.testing.assert_array_equal(got, expected)


def test_a_load_nobody_waited_for_reads_as_poison():
    got = load(numbers((16, 64)), (64, 8), (0, 0), 1024, wait=False)
    assert (got.view(np.uint32) == POISON).all()


def test_nan_fill():
    array = bf16(np.ones((4, 16)))
    got = load(array, (16, 8), (0, 0), 256, fmt="bf16", fill=1).view(np.uint16)[:128]
    np.testing.assert_array_equal(got[:64], array.reshape(-1))
    assert (got[64:] == 0x7FC0).all()


@pytest.mark.parametrize("steps", [(2, 1), (1, 3), (2, 2)])
def test_element_strides_take_fewer_elements(steps):
    """Of a box of b elements with stride s, ceil(b / s) are copied."""
    array = numbers((20, 64))
    expected, _ = boxed(array, (32, 8), (3, 2), steps=steps)
    got = load(array, (32, 8), (3, 2), expected.nbytes, elem_strides=steps)
    np.testing.assert_array_equal(got[: expected.nbytes], expected.reshape(-1).view(np.uint8))


RULES = {
    "box of no element": ({"box": (0, 8)}, "box of 0 elements"),
    "box too large": ({"box": (8, 257)}, "box of 257 elements"),
    "row of the box": ({"box": (12, 8)}, "rows of 24 bytes, not a multiple of 16"),
    "row under the swizzle": ({"box": (32, 8), "swizzle": 32}, "more than the swizzle's 32"),
    "stride": ({"strides": (120,)}, "stride of 120 bytes"),
    "dimension": ({"dims": (64, 0)}, "dimension 1 of 0 elements"),
    "element stride": ({"elem_strides": (9, 1)}, "element stride 9"),
    "rank": ({"dims": (64, 4, 4), "strides": (128, 512), "box": (8, 4, 1)}, "rank 3 in an"),
}


@pytest.mark.parametrize("what", RULES)
def test_broken_rule_of_a_map_stops(what):
    options, message = RULES[what]
    box = options.get("box", (64, 8))
    rest = {k: v for k, v in options.items() if k != "box"}
    names, moves = at((0, 0))
    text = SHARED + moves + "mbarrier.init.shared::cta.b64 [bar], 1;\n"
    m = module(entry(text + LOAD.format(rank=2, at=names), parameters=1))
    tensor = m.alloc(numbers((16, 64)))
    with pytest.raises(VMError, match=message):
        m.launch("k", 1, 1, args=[map_of(m, tensor, box, **rest)])


def test_addresses_of_map_and_target_are_aligned():
    names, moves = at((0, 0))
    text = SHARED + moves + "mbarrier.init.shared::cta.b64 [bar], 1;\n"
    instruction = LOAD.format(rank=2, at=names)
    for change, message in (("[sm+64]", "not 128-byte aligned"), ("[sm]", "64-byte aligned")):
        offset = "" if "64" in change else "add.u64 %q0, %q0, 8;\n"
        m = module(entry(text + offset + instruction.replace("[sm]", change), parameters=1))
        with pytest.raises(VMError, match=message):
            m.launch("k", 1, 1, args=[map_of(m, m.alloc(numbers((16, 64))), (64, 8))])


def test_what_lies_in_the_tensor_but_in_no_buffer_stops():
    names, moves = at((0, 12))
    text = SHARED + moves + "mbarrier.init.shared::cta.b64 [bar], 1;\n"
    m = module(entry(text + LOAD.format(rank=2, at=names), parameters=1))
    tensor = m.alloc(numbers((16, 64)), "weights")
    with pytest.raises(VMError, match=r"outside every registered buffer.*weights"):
        m.launch("k", 1, 1, args=[map_of(m, tensor, (64, 8), dims=(64, 17))])


def test_something_else_than_a_map_stops():
    names, moves = at((0, 0))
    m = module(entry(SHARED + moves + LOAD.format(rank=2, at=names), parameters=1))
    with pytest.raises(VMError, match="not a tensor map"):
        m.launch("k", 1, 1, args=[m.alloc(np.zeros(128, np.uint8))])


def test_a_map_may_be_a_kernel_parameter():
    names, moves = at((0, 0))
    text = f"""
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 out)
{{
.reg .pred %p<16>; .reg .b32 %r<64>; .reg .b64 %q<16>;
{SHARED}
mov.u32 %r0, %tid.x;
mov.b64 %q0, map;
cvta.param.u64 %q0, %q0;
ld.param.u64 %q1, [out];
{moves}
{first_thread("prefetch.tensormap [%q0];", "mbarrier.init.shared::cta.b64 [bar], 1;")}
bar.sync 0;
{
        first_thread(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 1024;",
            LOAD.format(rank=2, at=names),
        )
    }
{await_phase("bar")}
{from_shared("%q1", "sm", 1024)}
ret;
}}
"""
    m = module(text)
    tensor = m.alloc(numbers((8, 64)))
    out = m.alloc(np.zeros((8, 64), np.uint16))
    m.launch("k", 1, 32, args=[tensor_map(tensor, (64, 8), (128,), (64, 8), "u16"), out])
    np.testing.assert_array_equal(out, tensor)


def test_a_store_needs_the_proxy_fence():
    data, array = numbers((8, 64)), np.zeros((8, 64), np.uint16)
    with pytest.raises(VMError, match=r"missing fence\.proxy\.async"):
        store(STORE, swizzled(data, 0), array, (64, 8), (0, 0), fence="")


def test_tensormap_replace():
    """A kernel points a map at another tensor, one row shorter, before it uses it."""
    names, moves = at((0, 4))
    text = (
        SHARED
        + moves
        + first_thread(
            "mbarrier.init.shared::cta.b64 [bar], 1;",
            "tensormap.replace.tile.global_address.global.b1024.b64 [%q0], %q2;",
            "tensormap.replace.tile.global_dim.global.b1024.b32 [%q0], 1, 7;",
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;",
            LOAD.format(rank=2, at=names),
        )
    )
    text += "bar.sync 0;" + await_phase("bar") + from_shared("%q1", "sm", 512)
    m = module(entry(text, parameters=3))
    first, second = m.alloc(numbers((8, 64)), "first"), m.alloc(numbers((8, 64)) + 1, "second")
    out = m.alloc(np.zeros((4, 64), np.uint16))
    m.launch("k", 1, 32, args=[map_of(m, first, (64, 4)), out, second])
    np.testing.assert_array_equal(out[:3], second[4:7])
    assert not out[3].any()
