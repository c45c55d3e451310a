import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext import ops
from python_tests.ops.test_grouped_experts import CASES, make
from python_tests.references.packed_experts import pack_experts as reference
from python_tests.support.backends import SIMT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [
    {},
    {"transposed": True},
    {"gated": True},
    {"gated": True, "interleaved": True},
    {"gated": True, "interleaved": True, "transposed": True},
]
SHAPES = [(1, 2, 1), (3, 34, 33), (2, 64, 64), (0, 4, 4), (2, 0, 5), (2, 6, 0), (1, 96, 70)]


def draw(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a, b):
    as_int = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(as_int), b.view(as_int))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(d) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_as_the_reference_and_back(shape, layout, dtype):
    experts, rows, depth = shape
    stored = (experts, depth, rows) if layout.get("transposed") else shape
    weight = draw(stored, dtype)
    packed = ops.pack_experts(weight, **layout)
    assert packed.data_ptr() % 64 == 0
    expected = reference(weight, **layout)
    whole = packed.as_strided(expected.shape, expected.stride())  # with what fills the panels up
    assert same_bits(whole, expected)
    assert same_bits(ops.unpack_experts(packed, rows=rows, depth=depth, **layout), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_bit_pattern(dtype):
    bits = torch.arange(2**16, dtype=torch.int32)
    bits = bits.short() if dtype.itemsize == 2 else bits * 65537  # NaNs of every kind
    weight = bits.view(dtype).reshape(2, 256, 128)
    packed = ops.pack_experts(weight)
    assert same_bits(ops.unpack_experts(packed, rows=256, depth=128), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_unpacked(case, dtype):
    x, gate_up, down, *routing = make(*CASES[case], dtype)
    packed = ops.pack_experts(gate_up, gated=True), ops.pack_experts(down)
    out = ops.packed_experts(x, *packed, *routing, intermediate=down.shape[2])
    expected = ops.grouped_experts(x, gate_up, down, *routing)
    assert_same(out, expected)
    a = draw((routing[2].numel(), x.shape[1]), dtype)
    product = ops.packed_matmul(a, ops.pack_experts(gate_up), routing[1], columns=gate_up.shape[1])
    assert_same(product, ops.grouped_matmul_nt(a, gate_up, routing[1]))


def assert_same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
    assert torch.equal(a, b)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(counts, hidden, intermediate, dtype, activation, seed):
    x, gate_up, down, *routing = make(counts, 1, hidden, intermediate, dtype, seed=seed)
    packed = ops.pack_experts(gate_up, gated=True), ops.pack_experts(down)
    out = ops.packed_experts(x, *packed, *routing, intermediate=intermediate, activation=activation)
    assert_same(out, ops.grouped_experts(x, gate_up, down, *routing, activation=activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_the_batch(dtype):
    """One chain of sums whatever the number of rows: decoding gives prefill's bits."""
    x, gate_up, down, weights, *routing = make([40], 1, 600, 70, dtype)
    packed = ops.pack_experts(gate_up, gated=True), ops.pack_experts(down)
    whole = ops.packed_experts(x, *packed, weights, *routing, intermediate=70)
    slot = torch.zeros(1, dtype=torch.int32)
    one = torch.tensor([0, 1], dtype=torch.int32)
    for token in (0, 17, 39):
        at = routing[2][token].item()
        assert routing[1][at] == token
        alone = ops.packed_experts(
            x[token, None], *packed, weights[token, None], one, slot, slot, intermediate=70
        )
        assert torch.equal(alone[0], whole[token])


def test_threads_change_no_bit():
    x, gate_up, down, *routing = make([1, 0, 150, 49], 2, 130, 70, torch.bfloat16)
    packed = ops.pack_experts(gate_up, gated=True), ops.pack_experts(down)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(ops.packed_experts(x, *packed, *routing, intermediate=70))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_registration():
    # opcheck clones its arguments, which only depths of whole panels survive.
    x, gate_up, down, *routing = make([5, 0, 6], 1, 64, 32, torch.float32)
    for name, args, options in (
        ("pack_experts", (gate_up,), {"gated": True}),
        ("unpack_experts", (ops.pack_experts(down),), {"rows": 64, "depth": 32}),
        (
            "packed_experts",
            (x, ops.pack_experts(gate_up, gated=True), ops.pack_experts(down), *routing),
            {"intermediate": 32},
        ),
        ("packed_matmul", (x, ops.pack_experts(gate_up), routing[1]), {"columns": 64}),
    ):
        torch.library.opcheck(getattr(torch.ops.mergeme, name).default, args, options)


def test_gradients_are_refused():
    x, gate_up, down, *routing = make([5, 0, 6], 1, 12, 10, torch.float32)
    packed = ops.pack_experts(gate_up, gated=True), ops.pack_experts(down)
    out = ops.packed_experts(x.requires_grad_(), *packed, *routing, intermediate=10)
    with pytest.raises(NotImplementedError, match="packed_experts: packed weights are for infer"):
        out.sum().backward()


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda a: a | {"x": a["x"].double()}, TypeError, "x to be float16.*got float64"),
        (lambda a: a | {"down": a["down"].half()}, TypeError, "down to be float32, got float16"),
        (
            lambda a: a | {"gate_up": a["down"]},
            ValueError,
            r"as \[2, 1, 12, 32\], got \[2, 1, 10, 32\]",
        ),
        (lambda a: a | {"intermediate": 33}, ValueError, r"gate_up to hold \[2, 66, 12\]"),
        (lambda a: a | {"intermediate": -1}, ValueError, "intermediate of at least 0, got -1"),
        (lambda a: a | {"activation": "relu"}, ValueError, "silu, gelu or gelu_tanh, got relu"),
        (lambda a: a | {"inverse": a["inverse"] + 1}, IndexError, "inverse in"),
        (lambda a: a | {"x": a["x"][:, :5]}, ValueError, r"gate_up to hold \[2, 20, 5\]"),
        (
            lambda a: a | {"down": a["down"].clone()},
            ValueError,
            r"down to lie in memory as pack_experts made it, got strides \[320, 320, 32, 1\]",
        ),
    ],
)
def test_rejects_bad_input(spoil, error, message):
    x, gate_up, down, *routing = make([5, 6], 1, 12, 10, torch.float32)
    names = ["topk_weights", "expert_offsets", "permutation", "inverse"]
    args = dict(zip(names, routing, strict=True)) | {
        "x": x,
        "gate_up": ops.pack_experts(gate_up, gated=True),
        "down": ops.pack_experts(down),
        "intermediate": 10,
    }
    with pytest.raises(error, match=f"mergeme::packed_experts: .*{message}"):
        ops.packed_experts(**spoil(args))


def test_rejects_bad_weights():
    weight = draw((2, 6, 4), torch.float32)
    with pytest.raises(ValueError, match="expected gated with interleaved"):
        ops.pack_experts(weight, interleaved=True)
    with pytest.raises(ValueError, match="gate and up of as many rows each, got 5"):
        ops.pack_experts(weight[:, :5], gated=True)
    with pytest.raises(ValueError, match=r"weight of shape \[E, N, K\], got \[6, 4\]"):
        ops.pack_experts(weight[0])
    with pytest.raises(TypeError, match="weight to be float16, bfloat16 or float32, got int64"):
        ops.pack_experts(weight.long())
    with pytest.raises(ValueError, match=r"packed to hold \[2, 40, 4\]"):
        ops.unpack_experts(ops.pack_experts(weight), rows=40, depth=4)


def test_other_devices_say_so():
    with pytest.raises(NotImplementedError, match="packed weights are for the CPU"):
        SIMT.op("pack_experts")(draw((1, 2, 2), torch.float32))
