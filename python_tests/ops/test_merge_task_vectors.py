import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.magnitude_threshold import kept as kept_by_cut
from python_tests.references.merge_task_vectors import merge_task_vectors as reference
from python_tests.references.philox import keeps, philox, uniforms
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT, backends_with_errors
from python_tests.support.merge_digest import digest, digests_of_other_sets
from python_tests.support.merge_inputs import (
    DTYPES,
    MERGEME_KEY,
    TOY_KEY,
    mergeme,
    misaligned,
    models,
    toy,
    transposed,
)
from python_tests.support.tolerance import assert_within_rounding

OP = "merge_task_vectors"
MASKS = ["all", "magnitude", "random", "band"]
ELECTIONS = ["none", "sum", "count", "unweighted"]
# (shape, number of models): empty, one element, one model, odd sizes, many models, several blocks.
CASES = [((0,), 2), ((1,), 3), ((33, 65), 1), ((2, 0, 4), 2), ((7, 11), 40), ((4099,), 3)]


def tensor64(values, device="cpu"):
    return torch.tensor(values, dtype=torch.float64, device=device)


def selection_for(mask, base, tensors, density=0.6):
    if mask == "magnitude":
        keep = [int(density * base.numel())] * len(tensors)
        return mergeme_ext.magnitude_threshold(base, tensors, keep)
    if mask == "band":
        keep = [int(share * base.numel()) for share in (0.8, 0.1) for _ in tensors]
        cuts = mergeme_ext.magnitude_threshold(base, [*tensors, *tensors], keep)
        return torch.cat(cuts.chunk(2), 1)
    return tensor64([[density - 0.1 * (m % 3), 0.0] for m in range(len(tensors))], base.device)


def kept_for(mask, base, tensors, selection, key, offset=0):
    if mask == "magnitude":
        rows = [kept_by_cut(base, t, row) for t, row in zip(tensors, selection.cpu(), strict=True)]
    elif mask == "band":
        rows = [
            kept_by_cut(base, t, row[:2]) & ~kept_by_cut(base, t, row[2:])
            for t, row in zip(tensors, selection.cpu(), strict=True)
        ]
    elif mask == "random":
        indices = range(offset, offset + base.numel())
        rows = [
            torch.from_numpy(keeps(key % 2**64, m, indices, p))
            for m, p in enumerate(selection[:, 0].tolist())
        ]
    else:
        rows = [torch.ones(base.numel(), dtype=torch.bool)] * len(tensors)
    return torch.stack(rows).view(len(tensors), *base.shape)


def run(backend, base, tensors, selection, **options):
    """The op with weights and scales of some variety unless given."""
    count = len(tensors)
    ramp = torch.arange(count, dtype=torch.float64)
    arguments = {"mask": "all", "key": 0, "offset": 0, "elect": "none", "normalize": False}
    arguments |= {"lam": 0.7} | options
    weights = arguments.pop("weights", 0.5 + 0.25 * ramp).to(base.device)
    scales = arguments.pop("scales", 1.5 - 0.1 * ramp).to(base.device)
    return backend.op(OP)(base, tensors, weights, scales, selection, **arguments)


def check(backend, base, tensors, *, mask, elect, normalize, key=-3, offset=0, lam=0.7):
    count = len(tensors)
    ramp = torch.arange(count, dtype=torch.float64)
    weights, scales = 0.5 + 0.25 * ramp, 1.5 - 0.1 * ramp
    selection = selection_for(mask, base, tensors)
    options = {"elect": elect, "normalize": normalize, "lam": lam}
    out = run(backend, base, tensors, selection, mask=mask, key=key, offset=offset, **options)
    assert out.shape == base.shape and out.dtype == base.dtype and out.is_contiguous()
    kept = kept_for(mask, base, tensors, selection, key, offset)
    value, magnitude, close = reference(base, tensors, weights, scales, kept, **options)
    assert not close.any(), "choose a seed without near ties"
    # Per model: difference, coefficient, product, two sums; then division, two products, the base.
    assert_within_rounding(out, value, magnitude, terms=4 * count + 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elect", ELECTIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape, num_models", CASES)
def test_matches_reference(backend, dtype, elect, mask, shape, num_models):
    base, tensors = models(shape, dtype, num_models, device=backend.device)
    check(backend, base, tensors, mask=mask, elect=elect, normalize=num_models != 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    base, tensors = models((33, 65), dtype, device=backend.device)
    tensors = [layout(t) for t in tensors]
    check(backend, layout(base), tensors, mask="random", elect="sum", normalize=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0, 8, 13, 8 * 2**32 - 100, 2**40 + 5])
def test_offsets_of_random_masks(backend, offset):
    base, tensors = models((500,), torch.float32, device=backend.device)
    check(backend, base, tensors, mask="random", elect="none", normalize=False, offset=offset)


def test_reference_generator_has_the_published_values():
    """The known answers that Random123 publishes for philox4x32-10."""
    answers = {
        (0, 0): [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        (2**32 - 1, 2**32 - 1): [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    }
    for (counter, key), words in answers.items():
        assert [int(w) for w in philox([counter] * 4, [key] * 2)] == words


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_bits_are_the_published_values(backend):
    """Key 0, element 0, model 0: the words above, low halves first."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    bits = [w >> shift & 0xFFFF for w in words for shift in (0, 16)]
    assert uniforms(0, 0, range(8)).tolist() == bits
    base, ones = torch.zeros(8, device=backend.device), torch.ones(8, device=backend.device)
    for element, u in enumerate(bits):
        for threshold, value in ((u, 0.0), (u + 1, 1.0)):
            selection = tensor64([[threshold / 65536, 0.0]], backend.device)
            out = backend.op(OP)(
                *(base, [ones], *[tensor64([1.0], backend.device)] * 2, selection),
                **{"mask": "random", "key": 0, "offset": 0, "elect": "none"},
                **{"normalize": False, "lam": 1.0},
            )
            assert out[element] == value


NO_CUT = [[0.0, 0.0]] * 3
HALF = [[0.5, 0.0]] * 3


def toy_merge(elect, normalize, *, selection=NO_CUT, mask="all", scales=(1.0, 1.0, 1.0), **options):
    base, tensors = toy()
    weights = tensor64(options.pop("weights", [1.0, 1.0, 1.0]))
    options = {"key": TOY_KEY, "elect": elect, "normalize": normalize} | options
    selection = torch.as_tensor(selection, dtype=torch.float64)
    return mergeme_ext.merge_task_vectors(
        base, tensors, weights, tensor64(scales), selection, mask=mask, **options
    )


def toy_cuts():
    return mergeme_ext.magnitude_threshold(*toy(), [3, 3, 3])


def toy_factors():
    """l1 norm matching of the masks behind TOY_KEY."""
    norms = mergeme_ext.masked_norms(*toy(), tensor64(HALF), mask="random", key=TOY_KEY)
    return (norms[:, 0] / norms[:, 3]).tolist()


EXAMPLES = {
    "task_arithmetic": (
        lambda: toy_merge("none", False, lam=0.5),
        [1.1875, -1.9375, 1.125, 0.0625, 2.625, -1],
    ),
    "task_arithmetic_normalized": (
        lambda: toy_merge("none", True, weights=[1.0, 2.0, 1.0]),
        [1.03125, -2.0625, 1.0625, 0.0625, 2.6875, -1],
    ),
    "elect_by_sum": (
        lambda: toy_merge("sum", True),
        [1.3125, -1.375, 1.125, 0.4375, 2.4375, -0.9375],
    ),
    "elect_by_count": (
        lambda: toy_merge("count", True),
        [1.3125, -2.25, 1.125, 0.4375, 2.4375, -0.9375],
    ),
    "ties": (
        lambda: toy_merge("sum", True, mask="magnitude", selection=toy_cuts()),
        [1.5, -1.375, 1.5, 0.75, 2.4375, -1],
    ),
    "ties_unnormalized": (
        lambda: toy_merge("sum", False, mask="magnitude", selection=toy_cuts()),
        [1.5, -1.375, 1.5, 0.75, 1.875, -1],
    ),
    "dare_linear_l1": (
        lambda: toy_merge("none", False, mask="random", selection=HALF, scales=toy_factors()),
        [2.161538, -0.767308, 1.7, 1.2375, 2.4, -1.168269],
    ),
    "dare_linear_inverse_prob": (
        lambda: toy_merge("none", False, mask="random", selection=HALF, scales=[2.0] * 3),
        [2.25, -1.5, 2.5, 1.5, 2, -1.125],
    ),
    "dare_ties_l1": (
        lambda: toy_merge("sum", False, mask="random", selection=HALF, scales=toy_factors()),
        [2.161538, -0.317308, 1.7, 1.2375, 2.4, -1.168269],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name):
    merge, expected = EXAMPLES[name]
    torch.testing.assert_close(merge(), tensor64(expected), atol=1e-5, rtol=0)


def mergeme_merge(selection, **options):
    base, tensors = mergeme()
    ones = tensor64([1.0, 1.0, 1.0])
    scales = options.pop("scales", ones)
    return mergeme_ext.merge_task_vectors(base, tensors, ones, scales, selection, **options)


def test_worked_examples_of_mergeme():
    cuts = mergeme_ext.magnitude_threshold(*mergeme(), [4, 4, 4])
    ties = {"mask": "magnitude", "elect": "sum"}
    drop = {"mask": "random", "key": MERGEME_KEY, "scales": tensor64([1.25] * 3)}
    for out, expected in [
        (
            mergeme_merge(cuts, **ties, lam=1 / 3),
            [1.233333, -2.266667, 0.633333, 3.133333, 0.15],
        ),
        (mergeme_merge(cuts, **ties, normalize=True), [1.35, -2.4, 0.9, 3.4, 0.225]),
        # In binary 0.8 is 52429 / 65536; the scale is the card's 1 / 0.8.
        (
            mergeme_merge(tensor64([[0.8, 0.0]] * 3), **drop, lam=1 / 3),
            [1.041667, -2.083333, 0.645833, 3.104167, 0.145833],
        ),
    ]:
        torch.testing.assert_close(out, tensor64(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    base, tensors = models((3, 4), torch.float32, device=backend.device)
    ones = tensor64([1.0] * 3, backend.device)
    arguments = {"mask": "magnitude", "key": 1, "offset": 4, "elect": "sum"}
    arguments |= {"normalize": True, "lam": 0.5}
    inputs = base, tensors, ones, ones, selection_for("magnitude", base, tensors)
    torch.library.opcheck(backend.op(OP), inputs, arguments)
    base.requires_grad_()
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}"):
        backend.op(OP)(*inputs, **arguments).sum().backward()


BAD_INPUTS = [
    ("base", lambda t: t.int(), TypeError, "expected base to be float16.*got int32"),
    ("tensors", lambda t: [], ValueError, "expected tensors to hold at least one tensor"),
    ("tensors", lambda t: [t[0], t[1].half()], TypeError, r"tensors\[1\] to be float32.*float16"),
    ("tensors", lambda t: [t[0], t[1][0]], ValueError, r"tensors\[1\] of shape \[3, 4\].*\[4\]"),
    ("weights", lambda t: t.float(), TypeError, "expected weights to be float64, got float32"),
    ("weights", lambda t: t[:1], ValueError, r"expected weights of shape \[2\], got \[1\]"),
    ("scales", lambda t: t.half(), TypeError, "expected scales to be float64, got float16"),
    ("scales", lambda t: t[None], ValueError, r"expected scales of shape \[2\], got \[1, 2\]"),
    ("selection", lambda t: t.float(), TypeError, "expected selection to be float64, got float32"),
    ("selection", lambda t: t[:, 0], ValueError, r"selection of shape \[2, 2\], got \[2\]"),
    ("mask", lambda t: "band", ValueError, r"selection of shape \[2, 4\], got \[2, 2\]"),
    (
        "mask",
        lambda t: "odd",
        ValueError,
        "expected mask to be all, magnitude, random or band, got odd",
    ),
    (
        "elect",
        lambda t: "odd",
        ValueError,
        "expected elect to be none, sum, count or unweighted, got odd",
    ),
    ("offset", lambda t: -1, ValueError, r"expected offset in \[0, .*got -1"),
    (
        "offset",
        lambda t: 2**63 - 1,
        ValueError,
        r"expected offset in \[0, .*got 9223372036854775807",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, name, spoil, error, message):
    base, tensors = models((3, 4), torch.float32, 2, device=backend.device)
    ones = tensor64([1.0, 1.0], backend.device)
    selection = tensor64(NO_CUT[:2], backend.device)
    inputs = {"base": base, "tensors": tensors, "weights": ones, "scales": ones}
    inputs |= {"selection": selection, "mask": "all", "key": 0, "offset": 0, "elect": "none"}
    inputs |= {"normalize": False, "lam": 1.0}
    inputs[name] = spoil(inputs[name])
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(**inputs)


@pytest.mark.parametrize("backend, error", backends_with_errors(ValueError))
@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
def test_rejects_probability_out_of_range(backend, error, probability):
    base, tensors = models((3, 4), torch.float32, 2)
    selection = tensor64([[0.5, 0.0], [probability, 0.0]])
    with pytest.raises(error, match=r"probabilities in \[0, 1\].* for model 1|device assert"):
        run(backend, base, tensors, selection, mask="random")


@settings(max_examples=40)
@given(
    data=st.data(),
    n=st.integers(1, 3000),
    num_models=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(MASKS),
    elect=st.sampled_from(ELECTIONS),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backends_and_chunks_agree_to_the_bit(
    data, n, num_models, dtype, mask, elect, normalize, seed
):
    base, tensors = models((n,), dtype, num_models, seed)
    selection = selection_for(mask, base, tensors)
    options = {"mask": mask, "key": seed, "elect": elect, "normalize": normalize}
    whole = run(CPU, base, tensors, selection, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    for backend in (CPU, SIMT):
        parts = [
            run(backend, base[a:b], [t[a:b] for t in tensors], selection, offset=a, **options)
            for a, b in zip([0, *cuts], [*cuts, n], strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)


@settings(max_examples=20)
@given(n=st.integers(1, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_identities(n, dtype, seed):
    base, (tensor, _) = models((n,), dtype, 2, seed)
    one, selection = tensor64([1.0]), tensor64([[1.0, 0.0]])
    merged = mergeme_ext.merge_task_vectors
    for mask in ("all", "random"):  # keep everything, of one model: the model, but for rounding
        out = merged(base, [tensor], one, one, selection, mask=mask)
        u = torch.finfo(dtype).eps
        assert ((out - tensor).abs() <= 2 * u * (base.abs() + tensor.abs())).all()
    equal = merged(base, [base] * 3, *[tensor64([1.0] * 3)] * 2, tensor64(NO_CUT), elect="sum")
    assert torch.equal(equal, base)  # experts equal to the base change nothing
    dropped = merged(base, [tensor], one, one, tensor64([[0.0, 0.0]]), mask="random")
    assert torch.equal(dropped, base)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("elect", ELECTIONS)
def test_nan_shows_unless_dropped(backend, elect):
    base = torch.zeros(3, device=backend.device)
    first = torch.tensor([math.nan, -5.0, 1.0], device=backend.device)
    second = torch.tensor([-2.0, math.nan, 1.0], device=backend.device)
    third = torch.tensor([-2.0, -3.0, 1.0], device=backend.device)
    selection = tensor64([[1.0, 0.0]] * 3, backend.device)
    for mask, shows in (("all", True), ("magnitude", True), ("random", False)):
        if mask == "random":
            selection = tensor64([[0.0, 0.0]] * 3, backend.device)
        out = run(backend, base, [first, second, third], selection, mask=mask, elect=elect)
        assert out.isnan().tolist() == [shows, shows, False]
    band = tensor64([[2.0, 0.0, 0.5, 0.0]] * 3, backend.device)  # nothing but NaN
    out = run(backend, base, [first, second, third], band, mask="band", elect=elect)
    assert out.isnan().tolist() == [True, True, False] and out[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.1, 0.25, 1e300, math.inf, math.nan])
def test_any_threshold_is_compared_as_it_is(backend, threshold):
    """0.1 is no float32, so the nearest float32 lies above it and is kept whatever its index."""
    values = torch.tensor([0.0, 0.1, -0.25, 0.25, math.inf], device=backend.device)
    selection = tensor64([[threshold, 3.0]], backend.device)
    one = tensor64([1.0], backend.device)
    out = run(
        *(backend, torch.zeros_like(values), [values], selection),
        **{"mask": "magnitude", "weights": one, "scales": one, "lam": 1.0},
    )
    x = values.double().abs()
    ties = (x == threshold) & (torch.arange(5, device=backend.device) < 3)
    assert torch.equal(out, torch.where((x > threshold) | ties, values, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_divisors_of_zero(backend):
    """Weights that cancel divide by one; a zero total elects +."""
    base = torch.zeros(1, dtype=torch.float64, device=backend.device)
    tensors = [base + 2.0, base + 1.0, base - 3.0]
    selection = tensor64(NO_CUT, backend.device)
    weights = tensor64([1.0, 1.0, -2.0], backend.device)
    ones = tensor64([1.0, 1.0, 1.0], backend.device)
    options = {"scales": ones, "normalize": True, "lam": 1.0}
    assert run(backend, base, tensors, selection, weights=weights, **options).item() == 9.0
    out = run(backend, base, tensors, selection, weights=ones, elect="sum", **options)
    assert out.item() == 1.5
    agree = {"weights": weights, "elect": "sum"}  # all agree on +, and their weights cancel
    assert run(backend, base, tensors, selection, **agree, **options).item() == 9.0


@pytest.mark.parametrize("mask", MASKS)
def test_threads_change_no_bit(mask):
    base, tensors = models((2**18 + 3,), torch.bfloat16)
    selection, results = selection_for(mask, base, tensors), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = {"mask": mask, "elect": "sum", "normalize": True}
        results.append(run(CPU, base, tensors, selection, **options))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_instruction_sets_agree():
    """All four merge ops, in a process for each set."""
    assert set(digests_of_other_sets().values()) <= {digest()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_thread_order_changes_no_bit(schedule, mask):
    base, tensors = models((33, 65), torch.float32)
    arguments = SIMT, base, tensors, selection_for(mask, base, tensors)
    expected = run(*arguments, mask=mask, elect="sum")
    with schedule:
        assert torch.equal(run(*arguments, mask=mask, elect="sum"), expected)


@pytest.mark.slow
def test_compiles():
    base, tensors = models((33, 65), torch.float32)
    ones = tensor64([1.0] * 3)
    arguments = base, tensors, ones, ones, selection_for("random", base, tensors)
    options = {"mask": "random", "key": 3, "elect": "sum", "normalize": True}
    compiled = torch.compile(mergeme_ext.merge_task_vectors, fullgraph=True)
    expected = mergeme_ext.merge_task_vectors(*arguments, **options)
    assert torch.equal(compiled(*arguments, **options), expected)


@pytest.mark.slow
def test_more_than_2_31_elements():
    n = 2**31 + 11
    base = torch.zeros(n, dtype=torch.bfloat16)
    tensor = torch.zeros(n, dtype=torch.bfloat16)
    tensor[-3:] = torch.tensor([1.0, -4.0, 2.0])
    cuts = mergeme_ext.magnitude_threshold(base, [tensor], [2])
    assert cuts.tolist() == [[2.0, float(n)]]
    one = tensor64([1.0])
    out = mergeme_ext.merge_task_vectors(base, [tensor], one, one, cuts, mask="magnitude")
    assert out[-4:].tolist() == [0.0, 0.0, -4.0, 2.0] and out[: 2**20].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", MASKS)
def test_on_gpu(mask):
    base, tensors = models((1500, 1001), torch.bfloat16)
    selection = selection_for(mask, base, tensors)
    on_gpu = base.cuda(), [t.cuda() for t in tensors]
    options = {"mask": mask, "elect": "sum", "normalize": True, "offset": 3}
    with pytest.raises(ValueError, match="expected selection on cuda:0, got cpu"):
        run(CPU, *on_gpu, selection, **options)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = run(CPU, *on_gpu, selection.cuda(), **options)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out.cpu(), run(CPU, base, tensors, selection, **options))
