"""The kernels of sm_90a behind grouped_matmul and grouped_experts, as nvcc compiled them.

The ops' own tests run them too, where they are chosen; here are the cases that these kernels have
and others do not: their tiles' edges, what is in memory beside an expert's rows, and the choice.
"""

import pytest
import torch

from python_tests.ops.test_grouped_experts import check as check_experts
from python_tests.ops.test_grouped_experts import make as make_experts
from python_tests.ops.test_grouped_matmul import check, make, offsets_of, op
from python_tests.support import ptx
from python_tests.support.backends import CPU, PTX90, SIMT

pytestmark = pytest.mark.skipif(
    not ptx.built_ops("sm_90a"), reason="no PTX for sm_90a: build with MERGEME_SIMT=1 and nvcc"
)
LAYOUTS = ["nt", "nn", "tn"]
SHARED, TURNS, LOW, PAIR = (
    f"Shape<{shape}>"
    for shape in ("128, 256, 2, 1", "128, 128, 1, 1", "64, 256, 1, 1", "128, 256, 2, 2")
)
# Tokens of each expert, inner, outer; each with the shape of tile that it is given to in nt and nn.
CASES = {
    "turns": ([0, 1, 15, 17, 64, 127, 128, 129, 300], 72, 136, TURNS),
    "low": ([33, 0, 64, 17, 20], 264, 520, LOW),
    "one-chunk": ([70], 8, 8, TURNS),
    "long": ([3, 130], 1032, 264, SHARED),
    "pair": ([257], 1032, 264, PAIR),
}


def kernels(launches):
    return [launch.kernel for launch in launches if "sm90" in launch.kernel]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_edges_of_tiles(layout, case, dtype):
    *sizes, shape = CASES[case]
    args = make(layout, *sizes, dtype)
    with ptx.recording(seeds=(0, 1, 2)) as launches:
        out = op(PTX90, layout)(*args)
    check(out, layout, args)
    (kernel,) = set(kernels(launches))
    # The reduction of tn is over an expert's rows, which are few here.
    assert (TURNS if layout == "tn" else shape) in kernel
    for launch in launches:
        if "sm90" in launch.kernel:
            assert launch.statistics["shared"]["conflict_degree"] <= 1.1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_schedules_change_no_bit(layout, seed):
    args = make(layout, [3, 0, 130, 40], 200, 264, torch.bfloat16)
    with ptx.seeds(0):
        expected = op(PTX90, layout)(*args)
    with ptx.seeds(seed):
        assert torch.equal(op(PTX90, layout)(*args), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_rows_do_not_leak(layout):
    """A tile or a block of reduction steps may reach into the next expert's rows."""
    counts = [70, 1, 130]
    a, b, offsets = make(layout, counts, 72, 136, torch.bfloat16)
    expected = op(PTX90, layout)(a, b, offsets)
    a[70] = float("nan")  # the second expert's only row
    if layout == "tn":
        b[70] = float("inf")
    out = op(PTX90, layout)(a, b, offsets)
    spoilt = out.isnan().flatten(1).any(1)
    assert spoilt.nonzero().flatten().tolist() == ([1] if layout == "tn" else [70])
    assert torch.equal(out[~spoilt], expected[~spoilt])


def test_reduction_of_many_rows():
    args = make("tn", [1100, 0, 1190], 136, 264, torch.bfloat16)
    args = (*args[:2], offsets_of([1100, 1190]))
    with ptx.recording() as launches:
        out = op(PTX90, "tn")(*args)
    check(out, "tn", args)
    assert SHARED in kernels(launches)[0]


@pytest.mark.parametrize(
    "layout, counts, inner, outer, dtype, capability",
    [
        ("nt", [16, 16], 64, 64, torch.bfloat16, 90),  # few rows: bound by reading weights
        ("nt", [70], 64, 65, torch.bfloat16, 90),  # rows of results that are no whole chunks
        ("nn", [70], 65, 64, torch.bfloat16, 90),
        ("nt", [70], 64, 64, torch.float32, 90),
        ("nt", [70], 64, 64, torch.bfloat16, 80),
        ("tn", [70], 64, 64, torch.bfloat16, 100),  # later than 9.0 and without wgmma
        ("tn", [70], 64, 64, torch.bfloat16, 120),
    ],
)
def test_others_are_chosen(layout, counts, inner, outer, dtype, capability):
    args = make(layout, counts, inner, outer, dtype)
    with ptx.pretending(capability), ptx.recording() as launches:
        out = op(PTX90, layout)(*args)
    check(out, layout, args)
    assert launches and not kernels(launches)


def test_shim_does_not_run_them():
    args = make("nt", [70], 64, 64, torch.bfloat16)
    check(op(SIMT, "nt")(*args), "nt", args)


EXPERTS = ["gate_up", "rows", "grad_activation", "sums"]
SIZES = {"turns": ([0, 1, 15, 130, 65, 129], 72, 136), "low": ([33, 0, 64, 17, 20], 264, 520)}
SIZES["long"] = ([3, 129], 1032, 40)  # long in one of two products
SIZES["pair"] = ([258], 1032, 1032)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", ["turns", "low", "long"])
def test_experts(sizes, dtype):
    args = make_experts(SIZES[sizes][0], 2, *SIZES[sizes][1:], dtype)
    with ptx.recording(seeds=(0, 1, 2)) as launches:
        out = PTX90.op("grouped_experts")(*args)[0]
    check_experts(out, args)
    for name in ("gate_up", "rows"):
        assert any(f"{name}_sm90_kernel" in kernel for kernel in kernels(launches))
    for launch in launches:
        if "sm90" in launch.kernel:
            assert launch.statistics["shared"]["conflict_degree"] <= 1.1, launch.kernel


@pytest.mark.parametrize(
    "sizes, activation, dtype",
    [
        ("turns", "silu", torch.bfloat16),
        ("turns", "gelu", torch.float16),
        ("low", "gelu_tanh", torch.bfloat16),
        ("long", "silu", torch.float16),
        pytest.param("pair", "silu", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_experts(sizes, activation, dtype):
    """Beside the CPU's, which the op's own tests hold to references."""
    counts, hidden, intermediate = SIZES[sizes]
    args = list(make_experts(counts, 2, hidden, intermediate, dtype))
    args[4] = args[4].clamp(max=sum(counts) - 5)  # the last rows belong to no expert
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(args[0].shape, generator=g).to(dtype)
    results = {}
    for backend in (CPU, PTX90):
        inputs = [t.clone().requires_grad_() if i < 4 else t for i, t in enumerate(args)]
        with ptx.recording(seeds=(0, 1, 2)) as launches:
            out = backend.op("grouped_experts")(*inputs, activation=activation, save=True)[0]
            grads = torch.autograd.grad(out, inputs[:4], grad)
        results[backend.name] = [out.detach(), *grads]
    for name in EXPERTS:
        assert any(f"{name}_sm90_kernel" in kernel for kernel in kernels(launches))
    step = torch.finfo(dtype).eps / 2
    for ours, theirs in zip(results["ptx90"], results["cpu"], strict=True):
        # Intermediates are rounded at the same places, but sums are not in the same order, so that
        # they may fall to either side there, and so may results.
        difference = (ours.double() - theirs.double()).norm()
        assert difference <= 2 * step * theirs.double().norm()


@pytest.mark.parametrize("seed", range(6))
def test_schedules_change_no_bit_of_experts(seed):
    args = make_experts([3, 0, 130, 35], 2, 200, 136, torch.bfloat16)
    inputs = [t.clone().requires_grad_() if i < 4 else t for i, t in enumerate(args)]
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for number in (0, seed):
        with ptx.seeds(number):
            out = PTX90.op("grouped_experts")(*inputs, save=True)[0]
            results.append([out, *torch.autograd.grad(out, inputs[:4], grad)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
