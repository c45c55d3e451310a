import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.weighted_sum import weighted_sum as reference
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT
from python_tests.support.merge_inputs import DTYPES, mergeme, misaligned, models, toy, transposed
from python_tests.support.tolerance import assert_within_rounding

OP = "weighted_sum"
# (shape, number of models): empty, one element, one model, odd sizes, many models, two blocks.
CASES = [((0,), 2), ((1,), 3), ((33, 65), 1), ((2, 0, 4), 2), ((7, 11), 40), ((4099,), 3)]


def weights_of(num_models, device="cpu"):
    return torch.linspace(-0.7, 1.3, num_models, dtype=torch.float64).to(device)


def check(backend, tensors):
    weights = weights_of(len(tensors), backend.device)
    out = backend.op(OP)(tensors, weights)
    assert out.shape == tensors[0].shape and out.dtype == tensors[0].dtype and out.is_contiguous()
    assert_within_rounding(out, *reference(tensors, weights), terms=len(tensors) + 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, num_models", CASES)
def test_matches_reference(backend, dtype, shape, num_models):
    check(backend, models(shape, dtype, num_models, device=backend.device)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    check(backend, [layout(t) for t in models((33, 65), dtype, device=backend.device)[1]])


def test_worked_examples():
    _, (a, b, _) = toy()
    raw = [3, -6.875, 3.5, 1, 7.375, -2.9375]
    assert mergeme_ext.weighted_sum([a, b], torch.tensor([1.0, 2.0]).double()).tolist() == raw
    soup = [1, -2.291667, 1.166667, 0.333333, 2.458333, -0.979167]
    out = mergeme_ext.weighted_sum([a, b], torch.tensor([1.0, 2.0]).double() / 3)
    torch.testing.assert_close(out, torch.tensor(soup).double(), atol=1e-5, rtol=0)
    base, experts = mergeme()
    for tensors, expected in [
        ([base, *experts], [1.125, -2.1, 0.5925, 3.0625, 0.0875]),
        (experts, [1.166667, -2.133333, 0.623333, 3.083333, 0.116667]),
    ]:
        mean = torch.full((len(tensors),), 1 / len(tensors), dtype=torch.float64)
        out = mergeme_ext.weighted_sum(tensors, mean)
        torch.testing.assert_close(out, torch.tensor(expected).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    _, tensors = models((2, 3), torch.float64, 2, device=backend.device)
    weights = weights_of(2, backend.device)
    torch.library.opcheck(backend.op(OP), (tensors, weights))
    for t in (*tensors, weights):
        t.requires_grad_()
    torch.library.opcheck(backend.op(OP), (tensors, weights))

    def run(weights, *tensors):
        return backend.op(OP)(list(tensors), weights)

    torch.autograd.gradcheck(run, (weights, *tensors), fast_mode=backend.interpreted)
    if not backend.emulated:  # the same Python code; in emulation it takes seconds
        torch.autograd.gradgradcheck(run, (weights, *tensors), fast_mode=backend.interpreted)


BAD_INPUTS = [
    (lambda t, w: ([], w), ValueError, "expected tensors to hold at least one tensor"),
    (
        lambda t, w: ([x.int() for x in t], w),
        TypeError,
        r"expected tensors\[0\] to be float16.*int32",
    ),
    (
        lambda t, w: ([t[0], t[1].half(), t[2]], w),
        TypeError,
        r"tensors\[1\] to be float32.*float16",
    ),
    (lambda t, w: ([*t[:2], t[2][:1]], w), ValueError, r"tensors\[2\] of shape \[3, 4\].*\[1, 4\]"),
    (lambda t, w: (t, w.float()), TypeError, "expected weights to be float64, got float32"),
    (lambda t, w: (t, w[:2]), ValueError, r"expected weights of shape \[3\], got \[2\]"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, spoil, error, message):
    _, tensors = models((3, 4), torch.float32, device=backend.device)
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(*spoil(tensors, weights_of(3, backend.device)))


@settings(max_examples=40)
@given(
    n=st.integers(1, 3000),
    num_models=st.integers(1, 5),
    cut=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_backends_and_chunks_agree_to_the_bit(n, num_models, cut, seed, dtype):
    _, tensors = models((n,), dtype, num_models, seed)
    weights = weights_of(num_models)
    out = CPU.op(OP)(tensors, weights)
    assert torch.equal(out, SIMT.op(OP)(tensors, weights))
    at = int(cut * n)
    parts = [CPU.op(OP)([t[s] for t in tensors], weights) for s in (slice(0, at), slice(at, n))]
    assert torch.equal(out, torch.cat(parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend):
    tensors = [torch.tensor([float("nan"), float("inf"), float("inf"), 1.0], device=backend.device)]
    tensors.append(torch.tensor([1.0, 1.0, -float("inf"), 1.0], device=backend.device))
    out = backend.op(OP)(tensors, torch.ones(2, dtype=torch.float64, device=backend.device))
    assert out.isnan().tolist() == [True, False, True, False] and out[1].isinf()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    _, tensors = models((33, 65), torch.float32)
    expected = SIMT.op(OP)(tensors, weights_of(3))
    with schedule:
        assert torch.equal(SIMT.op(OP)(tensors, weights_of(3)), expected)


@pytest.mark.slow
def test_compiles():
    _, tensors = models((33, 65), torch.float32)
    compiled = torch.compile(mergeme_ext.weighted_sum, fullgraph=True)
    expected = mergeme_ext.weighted_sum(tensors, weights_of(3))
    assert torch.equal(compiled(tensors, weights_of(3)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpu():
    _, tensors = models((33, 65), torch.float32)
    on_gpu = [t.cuda() for t in tensors]
    with pytest.raises(ValueError, match=r"expected tensors\[1\] on cuda:0, got cpu"):
        mergeme_ext.weighted_sum([on_gpu[0], tensors[1]], weights_of(2, "cuda"))
    with pytest.raises(ValueError, match="expected weights on cuda:0, got cpu"):
        mergeme_ext.weighted_sum(on_gpu, weights_of(3))
    with torch.cuda.stream(torch.cuda.Stream()):
        out = mergeme_ext.weighted_sum(on_gpu, weights_of(3, "cuda"))
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out.cpu(), mergeme_ext.weighted_sum(tensors, weights_of(3)))
