"""TIES where it looks at the whole model: trim_scope, sign_tie, compat."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.merging import get
from mergeme_ext.merging import sweep as sweep_module
from mergeme_ext.merging.registry import Visit
from python_tests.references import merge_methods
from python_tests.references import whole_model as reference
from python_tests.support.toy import (
    BASE,
    DTYPES,
    MODELS,
    assert_close,
    assert_example,
    flat,
)
from python_tests.support.whole_model import (
    joined,
    make_model,
    merge_model,
    same_bits,
    split_model,
    survey_model,
    vector,
)

TIES = get("ties")
OPTIONS = [
    {"trim_scope": "model"},
    {"trim_scope": "model", "rescale": "l2"},
    {"sign_tie": "majority"},
    {"sign_tie": "majority", "elect": "count"},
    {"compat": "paper"},
]


def test_worked_example_of_the_original_trim():
    out = TIES(BASE, MODELS[:1], weights=1, density=0.5, compat="paper") - BASE
    assert_example(out, [0.5, -0.125, 0, 0.75, -0.625, 0])


def test_defaults_survey_nothing():
    model = make_model(torch.float32)
    assert survey_model("ties", model, {"weights": 1, "density": 0.3}) == ({}, 0)
    survey, rounds = survey_model(
        "ties", model, {"weights": 1, "density": 1.0, "trim_scope": "model"}
    )
    assert rounds == 0 and "thresholds" not in survey


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", ["none", "inverse_prob", "l1", "l2", "linf"])
def test_trims_over_the_model(dtype, rescale):
    model = make_model(dtype)
    weights, density = [0.2, 0.5, 1.0], [0.3, 0.05, 1.0]
    options = {"weights": weights, "density": density, "rescale": rescale}
    out = merge_model("ties", model, trim_scope="model", **options)
    base, tensors = joined(model)
    expected = merge_methods.ties(
        flat(base), [flat(t) for t in tensors], weights, density, rescale=rescale
    )
    assert_close(vector(out), expected, terms=20 if rescale == "none" else 300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_compat_paper_is_the_original(dtype, density):
    model = make_model(dtype)
    out = merge_model("ties", model, weights=1, density=density, compat="paper")
    assert_close(vector(out), reference.original_ties(*joined(model), density), terms=20)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    density=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
    compat=st.sampled_from(["paper", "mergekit"]),
)
def test_many_equal_magnitudes(sizes, density, seed, compat):
    """Small whole numbers: exact sums, ties on every cut, zero totals."""
    g = torch.Generator().manual_seed(seed)
    numel = sum(sizes)
    base = torch.randint(-3, 4, (numel,), generator=g).float()
    tensors = [base + torch.randint(-2, 3, (numel,), generator=g) for _ in range(3)]
    model = split_model(base, tensors, sizes)
    options = {"weights": 1, "density": density, "compat": compat, "trim_scope": "model"}
    out = vector(merge_model("ties", model, **options))
    if compat == "paper":
        expected = reference.original_ties(base, tensors, density)
    else:
        expected = merge_methods.ties(
            flat(base), [flat(t) for t in tensors], [1.0] * 3, [density] * 3
        )
    assert_close(out, expected, terms=10)


def test_ties_go_to_the_earlier_tensor_then_the_lower_index():
    base = torch.zeros(6)
    tuned = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 0.5])
    model = split_model(base, [tuned], [1, 3, 2])
    out = vector(merge_model("ties", model, weights=1, density=0.5, trim_scope="model"))
    assert out.tolist() == [1, 2, 1, 0, 0, 0]
    survey, rounds = survey_model(
        "ties", model, {"weights": 1, "density": 0.5, "trim_scope": "model"}
    )
    assert survey["thresholds"] == [1] and survey["tie_ends"] == {"t0": [1], "t1": [2]}
    assert rounds == 3


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("elect", ["sum", "count"])
def test_the_majority_decides_ties(sign, elect):
    base = torch.zeros(5)
    deltas = sign * torch.tensor([[1.0, 1.0, -1.0, 2.0, 0.0], [-1.0, 1.0, -1.0, 2.0, 0.0]])
    model = split_model(base, list(deltas), [2, 3])
    out = vector(merge_model("ties", model, weights=1, sign_tie="majority", elect=elect))
    assert out.tolist() == [sign, sign, -sign, 2 * sign, 0]
    out = vector(merge_model("ties", model, weights=1, elect=elect))
    assert out[0] == 1


def test_a_majority_that_ties_elects_minus():
    base = torch.zeros(3)
    deltas = torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, -1.0]])
    out = TIES(base, list(deltas), weights=1, sign_tie="majority")
    assert out.tolist() == [-1, 1, -1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_bit_depends_on_chunks_or_threads(options, monkeypatch):
    model = make_model(torch.bfloat16)
    options = {"weights": [0.3, 1, -0.5], "density": 0.4, **options}
    whole = merge_model("ties", model, **options)
    monkeypatch.setattr(sweep_module, "SWEEP_ELEMENTS", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same_bits(merge_model("ties", model, chunk=7, **options), whole)
    finally:
        torch.set_num_threads(threads)


def test_scopes_and_their_errors():
    model = make_model(torch.float32)
    name, (base, tensors) = next(iter(model.items()))
    bound = TIES.bind(3, {"weights": 1, "density": 0.5, "trim_scope": "model"})
    with pytest.raises(ValueError, match=r"^ties: expected a survey of the whole model, got none"):
        TIES.prepare(base, tensors, bound, tensor_name=name)
    survey, _ = survey_model("ties", model, {"weights": 1, "density": 0.3, "trim_scope": "model"})
    with pytest.raises(ValueError, match=r"^ties: expected the same density for all tensors"):
        TIES.prepare(base, tensors, bound, tensor_name=name, survey=survey)
    with pytest.raises(
        ValueError, match="expected trim_scope to be auto, tensor or model, got 'x'"
    ):
        TIES.bind(1, {"weights": 1, "trim_scope": "x"})


def test_a_model_without_elements():
    model = split_model(torch.zeros(0), [torch.zeros(0)], [0])
    assert vector(merge_model("ties", model, weights=1, density=0.5, compat="paper")).numel() == 0


def test_a_tensor_that_comes_twice_has_no_place_in_the_order():
    visit = Visit("a", torch.zeros(4), [torch.ones(4)])
    bound = TIES.bind(1, {"weights": 1, "density": 0.3, "trim_scope": "model"})
    with pytest.raises(ValueError, match=r"whose tensors come once .*, got 'a' again"):
        TIES.survey(lambda: iter([visit, visit]), {**bound, "density": [0.8]})
