import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references import quantize_fp8 as references
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT

OP = "quantize_fp8"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 127), (5, 128), (3, 129), (2, 700), (40, 256)]


def make(shape, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)


def codes(q):
    return q.cpu().view(torch.uint8)


def check(out, x):
    q, scale = out
    value, expected_scale = references.quantize_fp8(x)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape and q.is_contiguous()
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(codes(q), codes(value))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_bit_for_bit(backend, dtype, shape):
    x = make(shape, dtype, backend.device)
    check(backend.op(OP)(x), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_and_every_tie(backend):
    numbers = references.NUMBERS.float()
    between = (numbers[1:] + numbers[:-1]) / 2
    some = torch.cat(
        [numbers, between, between.nextafter(numbers[1:]), numbers.nextafter(between[:1])]
    )
    rows = torch.cat([some, -some])
    rows = torch.nn.functional.pad(rows, (0, -len(rows) % 127)).reshape(-1, 127)
    # 448 in every block makes its scale 1, and then the numbers are what is rounded.
    x = torch.cat([rows, torch.full((len(rows), 1), 448.0)], 1).to(backend.device)
    q, scale = backend.op(OP)(x)
    assert (scale == 1).all()
    check((q, scale), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_decodes_the_same(backend):
    x = make((64, 256), torch.float32, backend.device)
    q, scale = backend.op(OP)(x)
    ours = q.float().cpu() * scale.cpu().repeat_interleave(128, 1)
    bound = x.cpu().abs() / 16 * (1 + 2**-20) + scale.cpu().repeat_interleave(128, 1) * 2.0**-10
    assert ((ours - x.cpu()).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_at_the_edges(backend):
    inf, nan, tiny = float("inf"), float("nan"), 2.0**-149
    x = torch.zeros(7, 130)
    x[1, :2] = torch.tensor([tiny, -3 * tiny])
    x[2, :4] = torch.tensor([nan, 3.0, -1.0, 0.0])
    x[3, :4] = torch.tensor([inf, -inf, 7.0, -0.0])
    x[4, :] = nan
    x[5, :3] = torch.tensor([torch.finfo(torch.float32).max, 1.0, -2e38])
    x[6, 128:] = torch.tensor([1e-36, -5e-37])
    x = x.to(backend.device)
    q, scale = backend.op(OP)(x)
    check((q, scale), x)
    assert scale[0].tolist() == [1, 1] and scale[1, 0].item() == 2.0**-126
    assert q[3, :2].float().isnan().all() and q[3, 2].float() == 448 and codes(q)[3, 3] == 0x80


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_inputs(backend):
    x = make((9, 300), torch.bfloat16, backend.device)
    expected, expected_scale = backend.op(OP)(x)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for other in (x.t().contiguous().t(), shifted):
        q, scale = backend.op(OP)(other)
        assert torch.equal(codes(q), codes(expected)) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    x = make((3, 140), torch.float32, backend.device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backend.op(OP), (x,), test_utils=checks)
    _, scale = backend.op(OP)(x.requires_grad_())
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP} has no gradient"):
        scale.sum().backward()


@pytest.mark.parametrize("backend", [CPU, SIMT])
@pytest.mark.parametrize(
    "x, error, message",
    [
        (
            torch.zeros(2, 3, dtype=torch.float64),
            TypeError,
            "float16, bfloat16 or float32, got float64",
        ),
        (
            torch.zeros(2, 3, dtype=torch.int32),
            TypeError,
            "float16, bfloat16 or float32, got int32",
        ),
        (torch.zeros(3), ValueError, r"expected x of shape \[S, K\], got \[3\]"),
    ],
)
def test_rejects_bad_input(backend, x, error, message):
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(x)


@settings(max_examples=40)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 400),
    exponent=st.integers(-130, 120),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_reference(rows, columns, exponent, seed):
    x = make((rows, columns), torch.float32, seed=seed) * 2.0**exponent
    check(CPU.op(OP)(x), x)


def test_threads_change_no_bit():
    x = make((300, 700), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(CPU.op(OP)(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(codes(q), codes(results[0][0])) for q, _ in results)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    x = make((5, 300), torch.float32)
    expected, expected_scale = SIMT.op(OP)(x)
    with schedule:
        q, scale = SIMT.op(OP)(x)
    assert torch.equal(codes(q), codes(expected)) and torch.equal(scale, expected_scale)
