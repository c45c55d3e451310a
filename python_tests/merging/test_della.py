import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import (
    BASE,
    DTYPES,
    MODELS,
    assert_close,
    assert_example,
    flat,
    in_chunks,
    make,
)

DELLA = get("della")
# With this seed the first model's mask of a tensor called "w" is that of the worked example.
EXAMPLE = {"weights": 1, "density": 0.5, "seed": 26, "tensor_name": "w"}


def test_worked_example():
    q = [0.53, 0.47, 0.35, 0.65, 0.59, 0.41]
    bits = reference.decisions(6, EXAMPLE["seed"], "w", 0)
    mask = [b < round(p * 65536) for b, p in zip(bits, q, strict=True)]
    assert mask == [True, False, False, True, True, False]
    out = DELLA(BASE, MODELS[:1], **EXAMPLE) - BASE
    assert_example(out, [0.55, 0, 0, 0.825, -0.6875, 0])
    out = DELLA(BASE, MODELS[:1], **EXAMPLE, rescale="inverse_prob") - BASE
    assert_example(out, [0.943396, 0, 0, 1.153846, -1.059322, 0])
    out = DELLA(BASE, MODELS[:1], **EXAMPLE, rescale=False) - BASE
    assert_example(out, [0.5, 0, 0, 0.75, -0.625, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("rescale", ["none", "inverse_prob", "l1", "l2", "linf"])
def test_matches_loop(dtype, elect, rescale):
    base, models = make(dtype)
    weights, density, epsilon = [0.2, 0.5, 1.0], [0.3, 0.8, 1.0], [0.1, 0.19, 0.15]
    options = {"rescale": rescale, "elect": elect, "seed": 5, "lam": 0.4}
    named = {"density": density, "epsilon": epsilon, "tensor_name": "x.weight"}
    out = DELLA(base, models, weights=weights, **named, **options)
    expected = reference.della(
        *(flat(base), [flat(m) for m in models], base.shape[-1], weights, density, epsilon),
        **options,
        name="x.weight",
    )
    assert_close(out, expected, terms=22 if rescale in ("none", "inverse_prob") else 160)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (40,), (2, 3, 7), (0, 3), (3, 0)], ids=str)
def test_rows_are_the_last_dimension(shape):
    base, models = make(torch.float32, shape=shape, models=2)
    options = {"weights": 1, "density": 0.6, "epsilon": 0.3}
    out = DELLA(base, models, **options)
    expected = reference.della(
        *(flat(base), [flat(m) for m in models], shape[-1] if shape else 1),
        *([1.0, 1.0], [0.6, 0.6], [0.3, 0.3]),
        **{"seed": 0, "name": ""},
    )
    assert_close(out, expected, terms=160)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    length=st.integers(1, 40),
    chunk=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_chunks_change_no_bit(rows, length, chunk, dtype, seed):
    base, models = make(dtype, shape=(rows, length), models=2, seed=seed)
    options = {"weights": [1, 0.5], "density": 0.4, "seed": seed}
    whole = DELLA(base, models, **options, tensor_name="w")
    assert torch.equal(in_chunks(DELLA, base, models, chunk, tensor_name="w", **options), whole)


@pytest.mark.parametrize("density, epsilon", [(0.9, 0.15), (0.1, 0.15), (0.85, 0.15), (0.5, 0.5)])
def test_refuses_windows_that_reach_0_or_1(density, epsilon):
    message = rf"density \+ epsilon below 1.* got density {density} and epsilon {epsilon} for model"
    with pytest.raises(ValueError, match=message):
        DELLA(BASE, MODELS, weights=1, density=density, epsilon=epsilon)


def test_degenerate_cases():
    assert torch.equal(DELLA(BASE, MODELS[:1], weights=1), MODELS[0])
    assert torch.equal(DELLA(BASE, [BASE, BASE], weights=1, density=0.5), BASE)
    assert torch.equal(DELLA(BASE, MODELS, weights=1), get("ties")(BASE, MODELS, weights=1))
    nowhere = DELLA(BASE, MODELS, weights=1, density=0.5, epsilon=0)
    assert nowhere.shape == BASE.shape


def test_expectation_is_the_task_vector():
    base, (model, *_) = make(torch.float64, shape=(4, 1000))
    options = {"weights": 1, "density": 0.25, "epsilon": 0.1, "rescale": "inverse_prob"}
    outs = [DELLA(base, [model], seed=s, **options) - base for s in range(64)]
    x = model - base
    # The mean of 64 draws of Bernoulli(q) x / q has a standard deviation of at most this.
    z = (torch.stack(outs).mean(0) - x) / (x.abs() * ((1 - 0.15) / 0.15 / 64) ** 0.5)
    assert abs(z.mean()) < 4 / x.numel() ** 0.5 and z.abs().max() < 6


def test_larger_changes_are_kept_more_often():
    base, (model, *_) = make(torch.float32, shape=(8, 1000))
    options = {"weights": 1, "density": 0.5, "epsilon": 0.4, "rescale": "none"}
    kept = DELLA(base, [model], **options) != base
    ranks = (model - base).abs().argsort(-1).argsort(-1)
    for low, high, share in ((0, 100, 0.1 + 0.04), (450, 550, 0.5), (900, 1000, 0.9 - 0.04)):
        part = kept[(ranks >= low) & (ranks < high)].double().mean()
        assert abs(part - share) < 5 * (share * (1 - share) / 800) ** 0.5
