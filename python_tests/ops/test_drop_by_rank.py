import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.drop_by_rank import drop_by_rank as reference
from python_tests.references.drop_by_rank import probabilities, ranks
from python_tests.references.magnitude_threshold import task_vector
from python_tests.references.philox import uniforms
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT, backends_with_errors
from python_tests.support.merge_inputs import DTYPES, misaligned, models, toy, transposed

OP = "drop_by_rank"
# (shape, number of models): empty, one element, scalar, rows of one, odd sizes, rows longer than a
# block of threads, three dimensions.
CASES = [
    ((0,), 2),
    ((1,), 3),
    ((), 2),
    ((5, 1), 2),
    ((13, 33), 3),
    ((2, 0, 4), 2),
    ((3, 1031), 1),
    ((2, 3, 9), 2),
]


def selection_for(count, device="cpu"):
    rows = [[0.2 + 0.1 * (m % 3), 0.9 - 0.05 * m] for m in range(count)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def run(backend, base, tensors, selection, *, key=5, offset=0, inverse_prob=False):
    options = {"key": key, "offset": offset, "inverse_prob": inverse_prob}
    return backend.op(OP)(base, tensors, selection, **options)


def check(backend, base, tensors, **options):
    selection = selection_for(len(tensors), base.device)
    out = run(backend, base, tensors, selection, **options)
    acc = torch.float64 if base.dtype == torch.float64 else torch.float32
    assert out.dtype == acc and out.shape == (len(tensors), *base.shape) and out.is_contiguous()
    options = {"key": 5, "offset": 0, "inverse_prob": False} | options
    expected = reference(base, tensors, selection.cpu(), **options)
    assert torch.equal(out.cpu() != 0, expected != 0)
    # With the division: q is rounded to the accumulation type, then the quotient.
    u = torch.finfo(acc).eps / 2
    assert ((out.cpu().double() - expected).abs() <= 2.1 * u * expected.abs()).all()
    if not options["inverse_prob"]:
        assert torch.equal(out.cpu().double(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse_prob", [False, True])
@pytest.mark.parametrize("shape, num_models", CASES)
def test_matches_reference(backend, dtype, inverse_prob, shape, num_models):
    base, tensors = models(shape, dtype, num_models, device=backend.device)
    check(backend, base, tensors, inverse_prob=inverse_prob)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    base, tensors = models((9, 65), dtype, device=backend.device)
    check(backend, layout(base), [layout(t) for t in tensors], key=-7, offset=13)


@pytest.mark.parametrize("offset", [8, 13, 8 * 2**32 - 100, 2**40 + 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets(backend, offset):
    base, tensors = models((2, 250), torch.float32, 2, device=backend.device)
    check(backend, base, tensors, offset=offset)


def test_worked_example():
    """The ranks and probabilities of the toy data's first task vector, p = 0.5, epsilon = 0.15."""
    base, tensors = toy()
    x = task_vector(base, tensors[0]).tolist()
    assert ranks(x) == [3, 2, 0, 5, 4, 1]
    q = [0.53, 0.47, 0.35, 0.65, 0.59, 0.41]
    assert probabilities(x, 0.35, 0.65) == pytest.approx(q, abs=1e-12)
    selection = torch.tensor([[0.35, 0.65]], dtype=torch.float64)
    share = torch.zeros(6, dtype=torch.float64)
    for key in range(4096):
        out = mergeme_ext.drop_by_rank(base, tensors[:1], selection, key=key, inverse_prob=True)
        share += out[0] != 0
        kept = out[0] != 0
        expected = (torch.tensor(x) / torch.tensor(q, dtype=torch.float64))[kept]
        torch.testing.assert_close(out[0][kept], expected, atol=1e-9, rtol=0)
    nonzero = [i for i, v in enumerate(x) if v]
    for i in nonzero:  # four standard deviations of 4096 draws
        assert abs(share[i] / 4096 - q[i]) < 4 * math.sqrt(q[i] * (1 - q[i]) / 4096)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_magnitudes_rank_by_index(backend):
    """With probabilities from 0 to 1 over 64 equal ones, the first is always kept."""
    base = torch.zeros(64, device=backend.device)
    tensor = torch.ones_like(base)
    tensor[1::2] = -1
    selection = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=backend.device)
    kept = torch.stack([run(backend, base, [tensor], selection, key=k)[0] != 0 for k in range(200)])
    share = kept.double().mean(0).cpu()
    assert share[0] == 1 and share[-1] == 0
    expected = torch.linspace(1, 0, 64, dtype=torch.float64)
    assert ((share - expected).abs() <= 4.5 * (0.25 / 200) ** 0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_ranks_above_infinity(backend, dtype):
    base = torch.zeros(4, dtype=dtype, device=backend.device)
    tensor = torch.tensor([math.inf, -math.nan, 1.0, -2.0], dtype=dtype, device=backend.device)
    always = torch.tensor([[1.0, 1.0]], dtype=torch.float64, device=backend.device)
    out = run(backend, base, [tensor], always)[0]
    assert out.isnan().tolist() == [False, True, False, False]
    never = run(backend, base, [tensor], always * 0)[0]
    assert torch.equal(never, torch.zeros_like(never))
    top = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=backend.device)
    for key in range(20):
        out = run(backend, base, [tensor], top, key=key)[0]
        assert out[1].isnan() and out[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_are_rounded_to_multiples_of_2_to_the_minus_16(backend):
    """Around the random bits of an element a step decides; halves go to the even multiple."""
    base, tensor = torch.zeros(1, device=backend.device), torch.ones(1, device=backend.device)
    for key in range(6):
        bits = int(uniforms(key, 0, [0])[0])
        for more in (0.25, 0.5, 0.75, 1.0, 1.5):
            q = (bits + more) / 65536
            selection = torch.tensor([[q, q]], dtype=torch.float64, device=backend.device)
            out = run(backend, base, [tensor], selection, key=key)
            assert out.item() == (bits < round(q * 65536))


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    base, tensors = models((3, 4), torch.float32, device=backend.device)
    arguments = {"key": 3, "offset": 4, "inverse_prob": True}
    inputs = base, tensors, selection_for(3, backend.device)
    torch.library.opcheck(backend.op(OP), inputs, arguments)
    base.requires_grad_()
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}"):
        backend.op(OP)(*inputs, **arguments).sum().backward()


BAD_INPUTS = [
    ("base", lambda t: t.int(), TypeError, "expected base to be float16.*got int32"),
    ("tensors", lambda t: [], ValueError, "expected tensors to hold at least one tensor"),
    ("tensors", lambda t: [t[0], t[1].half()], TypeError, r"tensors\[1\] to be float32.*float16"),
    ("tensors", lambda t: [t[0], t[1][0]], ValueError, r"tensors\[1\] of shape \[3, 4\].*\[4\]"),
    ("selection", lambda t: t.float(), TypeError, "expected selection to be float64, got float32"),
    ("selection", lambda t: t[:1], ValueError, r"selection of shape \[2, 2\], got \[1, 2\]"),
    ("offset", lambda t: -1, ValueError, r"expected offset in \[0, .*got -1"),
    ("offset", lambda t: 2**63 - 1, ValueError, r"expected offset in \[0, .*got 9223372036854775"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, name, spoil, error, message):
    base, tensors = models((3, 4), torch.float32, 2, device=backend.device)
    inputs = {"base": base, "tensors": tensors, "selection": selection_for(2, backend.device)}
    inputs |= {"key": 0, "offset": 0, "inverse_prob": False}
    inputs[name] = spoil(inputs[name])
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(**inputs)


@pytest.mark.parametrize("backend", [CPU, SIMT])
def test_rejects_long_rows(backend):
    base = torch.empty(1, dtype=torch.float16).expand(0, 2**32)
    with pytest.raises(ValueError, match=f"mergeme::{OP}: expected rows of base to be shorter"):
        run(backend, base, [base], selection_for(1))


@pytest.mark.parametrize("backend, error", backends_with_errors(ValueError))
@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
@pytest.mark.parametrize("column", [0, 1])
def test_rejects_probability_out_of_range(backend, error, probability, column):
    base, tensors = models((3, 4), torch.float32, 2)
    selection = selection_for(2)
    selection[1, column] = probability
    with pytest.raises(error, match=r"probabilities in \[0, 1\].* for model 1|device assert"):
        run(backend, base, tensors, selection)


@settings(max_examples=30)
@given(
    data=st.data(),
    rows=st.integers(1, 8),
    length=st.integers(1, 300),
    num_models=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    inverse_prob=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backends_and_chunks_agree_to_the_bit(
    data, rows, length, num_models, dtype, inverse_prob, seed
):
    base, tensors = models((rows, length), dtype, num_models, seed)
    selection = selection_for(num_models)
    options = {"key": seed, "inverse_prob": inverse_prob}
    whole = run(CPU, base, tensors, selection, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=2)))
    for backend in (CPU, SIMT):
        parts = [
            run(
                *(backend, base[a:b], [t[a:b] for t in tensors], selection),
                **options,
                offset=a * length,
            )
            for a, b in zip([0, *cuts], [*cuts, rows], strict=True)
        ]
        assert torch.equal(torch.cat(parts, 1), whole)


@settings(max_examples=30)
@given(data=st.data(), n=st.integers(1, 60), dtype=st.sampled_from(DTYPES), key=st.integers(0, 99))
def test_ties_on_a_coarse_grid(data, n, dtype, key):
    grid = st.lists(st.integers(-6, 6), min_size=n, max_size=n)
    base, tensor = (torch.tensor(data.draw(grid), dtype=dtype) / 8 for _ in range(2))
    check(CPU, base, [tensor], key=key)
    check(SIMT, base, [tensor], key=key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    base, tensors = models((123, 1031), dtype)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(CPU, base, tensors, selection_for(3), inverse_prob=True))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    base, tensors = models((3, 200), torch.float32, 2)
    expected = run(SIMT, base, tensors, selection_for(2))
    with schedule:
        assert torch.equal(run(SIMT, base, tensors, selection_for(2)), expected)


@pytest.mark.slow
def test_compiles():
    base, tensors = models((33, 65), torch.float32)
    compiled = torch.compile(mergeme_ext.drop_by_rank, fullgraph=True)
    expected = mergeme_ext.drop_by_rank(base, tensors, selection_for(3), key=1)
    assert torch.equal(compiled(base, tensors, selection_for(3), key=1), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(1500, 1001), (3, 400_000)])
def test_on_gpu(shape):
    base, tensors = models(shape, torch.bfloat16)
    on_gpu = base.cuda(), [t.cuda() for t in tensors]
    selection = selection_for(3)
    with pytest.raises(ValueError, match="expected selection on cuda:0, got cpu"):
        mergeme_ext.drop_by_rank(*on_gpu, selection)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = mergeme_ext.drop_by_rank(*on_gpu, selection.cuda(), key=3, inverse_prob=True)
        torch.cuda.current_stream().synchronize()
    expected = mergeme_ext.drop_by_rank(base, tensors, selection, key=3, inverse_prob=True)
    assert torch.equal(out.cpu(), expected)
