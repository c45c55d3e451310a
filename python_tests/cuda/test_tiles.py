"""The tensor-core kernels without a GPU: all heights of tiles, dropped rows, both directions."""

from functools import partial

import pytest
import torch

from mergeme_ext import _simt
from python_tests.ops import test_grouped_experts as experts
from python_tests.ops import test_grouped_matmul as matmul
from python_tests.support.backends import EMULATED, SCHEDULES, SIMT
from python_tests.support.tolerance import assert_as_good_as_eager

# Rows of each expert by the height of the tile that they get (room for twice their average): some
# experts need one tile, some several, some none. The shim runs three blocks at a time, so blocks
# take several tiles.
HEIGHTS = {16: [3, 0, 17, 1], 32: [9, 33, 0, 18], 64: [60, 0, 27, 5], 128: [130, 0, 77, 1]}


def without_tail(offsets, rows):
    """The last `rows` rows belong to no expert."""
    return offsets.clamp(max=int(offsets[-1]) - rows)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_products_of_every_height(backend, layout, height, dtype):
    inner, outer = 136, 152  # more than two stages, a tile and a part of one
    a, b, offsets = matmul.make(layout, HEIGHTS[height], inner, outer, dtype)
    a[-2:] = float("nan")
    args = (a, b, without_tail(offsets, 2))
    out = matmul.op(backend, layout)(*args)
    assert (out[-2:] == 0).all()
    matmul.check(out[:-2], layout, (a[:-2], b, args[2]))


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_do_not_depend_on_thread_order(schedule, layout):
    args = matmul.make(layout, [30, 0, 21], 40, 72, torch.bfloat16)
    expected = matmul.op(SIMT, layout)(*args)
    with schedule:
        assert torch.equal(matmul.op(SIMT, layout)(*args), expected)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_heights_change_no_bit(backend, layout):
    """The products of a row are summed in one order, whatever the tile around it."""
    a, b, _ = matmul.make(layout, [150], 136, 72, torch.bfloat16)
    rows = {
        n: matmul.op(backend, layout)(a[:n], b, torch.tensor([0, n]).int()) for n in (7, 16, 30)
    }
    rows[150] = matmul.op(backend, layout)(a, b, torch.tensor([0, 150]).int())
    for n, out in rows.items():
        assert torch.equal(out, rows[150][:n])


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_experts_than_threads_plan_at_once(backend, dtype):
    counts = [(7 * e) % 3 for e in range(300)]
    args = matmul.make("nt", counts, 8, 8, dtype)
    matmul.check(matmul.op(backend, "nt")(*args), "nt", args)


@pytest.fixture
def hopper():
    _simt.set_compute_capability(90)
    yield
    _simt.set_compute_capability(80)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_torchs_product_on_newer_devices(hopper, layout):
    """The same contract: rows of no expert, experts without rows, contiguous results."""
    a, b, offsets = matmul.make(layout, [5, 0, 12, 7], 24, 40, torch.bfloat16)
    a[-2:] = float("nan")
    if layout == "tn":
        b[-2:] = float("nan")
    offsets = without_tail(offsets, 2)
    with torch.profiler.profile() as profile:
        out = matmul.op(SIMT, layout)(a, b, offsets)
    assert any(e.key == "aten::_grouped_mm" for e in profile.key_averages())
    if layout == "tn":
        matmul.check(out, layout, (a[:-2], b[:-2], offsets))
    else:
        assert (out[-2:] == 0).all()
        matmul.check(out[:-2], layout, (a[:-2], b, offsets))


@pytest.mark.parametrize("spoil", ["float32", "float16", "odd", "misaligned", "no-rows"])
def test_torchs_product_only_where_it_serves(hopper, spoil):
    dtype = getattr(torch, spoil, torch.bfloat16)
    a, b, offsets = matmul.make(
        "nt", [0, 0] if spoil == "no-rows" else [5, 9], 16, 12 if spoil == "odd" else 24, dtype
    )
    if spoil == "misaligned":
        a = matmul.misaligned(a)
    with torch.profiler.profile() as profile:
        out = matmul.op(SIMT, "nt")(a, b, offsets)
    assert not any(e.key == "aten::_grouped_mm" for e in profile.key_averages())
    matmul.check(out, "nt", (a, b, offsets))


def test_offsets_are_checked_before_torchs_product(hopper):
    a, b, _ = matmul.make("nt", [5, 9], 16, 24, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"device assert: .*expert_offsets"):
        matmul.op(SIMT, "nt")(a, b, torch.tensor([0, 5, 15]).int())


def gradients(function, args, dtype):
    floats = [t.detach().clone().requires_grad_() for t in args[:4]]
    out = function(*floats, *args[4:])
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out)
    return out.detach(), *torch.autograd.grad(out, floats, seed)


def expert_case(height, dtype, dropped=2):
    counts = list(HEIGHTS[height])
    counts[0] += sum(counts) % 2
    args = experts.make(counts, 2, 72, 136, dtype)
    return (*args[:4], without_tail(args[4], dropped), *args[5:])


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("height", HEIGHTS)
def test_experts_of_every_height(backend, height, dtype):
    args = expert_case(height, dtype)
    exact = gradients(experts.eager, [t.double() for t in args[:4]] + list(args[4:]), dtype)
    run = partial(experts.run, backend)
    ours, theirs = (gradients(f, args, dtype) for f in (run, experts.eager))
    for mine, right, other in zip(ours, exact, theirs, strict=True):
        assert_as_good_as_eager(mine, right, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_experts_do_not_depend_on_thread_order(schedule, dtype):
    args = experts.make([13, 0, 30, 5], 2, 40, 24, dtype)
    expected = gradients(partial(experts.run, SIMT), args, dtype)
    with schedule:
        got = gradients(partial(experts.run, SIMT), args, dtype)
    assert all(map(torch.equal, got, expected))


def direct(backend, args, grad, saved, mask, activation="silu"):
    op = backend.op("grouped_experts_backward")
    return op(grad, *args, saved, activation=activation, output_mask=mask)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_alone_is_the_same(backend, dtype):
    args = experts.make([13, 0, 30, 5], 2, 40, 24, dtype)
    args = (*args[:4], without_tail(args[4], 3), *args[5:])
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    _, saved = backend.op("grouped_experts")(*args, save=True)
    every = direct(backend, args, grad, saved, [True] * 4)
    for i in range(4):
        alone = direct(backend, args, grad, saved, [i == j for j in range(4)])
        assert torch.equal(alone[i], every[i])
        assert all(alone[j].numel() == 0 for j in range(4) if j != i)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_saved_products_and_activations(backend, activation, dtype):
    args = experts.make([13, 0, 30, 5], 2, 40, 24, dtype)
    x, gate_up, _, _, offsets, permutation, _ = args
    args = (*args[:4], without_tail(offsets, 3), *args[5:])
    out, saved = backend.op("grouped_experts")(*args, activation=activation, save=True)
    plain, empty = backend.op("grouped_experts")(*args, activation=activation)
    assert torch.equal(out, plain) and empty.shape == (0, 48)
    assert (saved[-3:] == 0).all()
    products = matmul.references.grouped_matmul_nt(x[permutation.long() // 2], gate_up, args[4])
    matmul.assert_within_rounding(saved, *products, terms=40)
    right = experts.reference(*args, activation=activation)
    torch.testing.assert_close(out.double(), right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("height", [16, 128])
def test_activations_on_tensor_cores(backend, height, activation):
    """Against the portable kernels in float64, on the same bfloat16 values."""
    args = expert_case(height, torch.bfloat16)
    wide = (*(t.double() for t in args[:4]), *args[4:])
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    op = partial(backend.op("grouped_experts"), activation=activation, save=True)
    (out, saved), (exact_out, _) = op(*args), op(*wide)
    eps = torch.finfo(torch.bfloat16).eps
    got = direct(backend, args, grad, saved, [True] * 4, activation)
    exact = direct(backend, wide, grad.double(), saved.double(), [True] * 4, activation)
    for ours, right in zip((out, *got), (exact_out, *exact), strict=True):
        # At most four roundings to bfloat16 lie between inputs and result, each of half an eps.
        assert (ours.double() - right).norm() <= 2 * eps * right.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_the_routing():
    """Nothing waits for the host: a graph may be replayed with other counts of rows."""
    op = torch.ops.mergeme.grouped_experts
    first, second = (
        experts.make(counts, 2, 72, 136, torch.bfloat16, "cuda", seed)
        for seed, counts in enumerate(([60, 0, 27, 5], [1, 80, 11, 0]))
    )
    static = tuple(t.clone() for t in first)
    op(*static)  # what the driver is asked once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = op(*static)
    for args in (second, first):
        for to, values in zip(static, args, strict=True):
            to.copy_(values)
        graph.replay()
        assert torch.equal(out, op(*args)[0])
