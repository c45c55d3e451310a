import pytest
import torch

from mergeme_ext.merging import get
from mergeme_ext.merging import sweep as sweep_module
from python_tests.references import whole_model as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example
from python_tests.support.whole_model import (
    make_model,
    merge_model,
    same_bits,
    survey_model,
    vector,
)

FISHER = get("fisher")
THETA = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]


def fishers_of(model, dtype=torch.float32, seed=5):
    """Fishers over many orders of magnitude, some elements zero in all models."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, (base, tensors) in model.items():
        alive = torch.rand(base.shape, generator=g) < 0.9
        draws = [torch.randn(base.shape, generator=g, dtype=torch.float64) for _ in tensors]
        out[name] = [((1e-3 * x * 10**x) ** 2 * alive).to(dtype) for x in draws]
    return out


def test_worked_examples():
    fishers = [torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])]
    assert_example(FISHER(None, THETA, f0=0, normalize=False, statistics=fishers), [2.5, 2.5])
    fishers = [torch.tensor([1.0, 3.0]), torch.tensor([30.0, 10.0])]
    out = FISHER(None, THETA, normalize=False, statistics=fishers)
    assert_example(out, [2.935484, 3.538461])
    assert_example(FISHER(None, THETA, statistics=fishers), [2.5, 2.5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_formula(dtype, normalize):
    model, weights = make_model(dtype), [0.2, 0.5, 1.0]
    statistics = fishers_of(model)
    options = {"weights": weights, "normalize": normalize}
    out = merge_model("fisher", model, statistics=statistics, **options)
    norms = None
    if normalize:
        norms = [reference.fisher_norm([f[m] for f in statistics.values()]) for m in range(3)]
    for name, (_, tensors) in model.items():
        args = (statistics[name], weights, 1e-6, norms)
        expected = reference.fisher(tensors, *args)
        size = reference.fisher([t.abs() for t in tensors], *args)
        assert_close(out[name], (expected.flatten().tolist(), size.flatten().tolist()), terms=12)


def test_the_norm_is_of_the_whole_model():
    model = make_model(torch.float32)
    statistics = fishers_of(model)
    survey, rounds = survey_model("fisher", model, {}, statistics)
    norms = [reference.fisher_norm([f[m] for f in statistics.values()]) for m in range(3)]
    assert rounds == 1 and survey["norms"] == pytest.approx(norms, rel=1e-12)
    assert survey_model("fisher", model, {"normalize": False}, statistics) == ({}, 0)


@pytest.mark.parametrize("f0", [0, 1e-6])
def test_dead_elements_get_the_mean(f0):
    zeros = [torch.zeros(6)] * 3
    mean = sum(MODELS) / 3
    for options in ({"normalize": False}, {}):
        out = FISHER(BASE, MODELS, f0=f0, statistics=zeros, **options)
        torch.testing.assert_close(out, mean)


def test_a_tensor_without_statistics_gets_the_mean_and_a_note():
    notes = {}
    model = {"a": (BASE, MODELS)}
    out = merge_model("fisher", model, notes=notes, normalize=False, weights=[1, 1, 2])
    torch.testing.assert_close(out["a"], (MODELS[0] + MODELS[1] + 2 * MODELS[2]) / 4)
    assert notes == {"fisher": "no statistics: mean by weight"}


def test_equal_models_and_scale_of_weights():
    fishers = [torch.rand(6) for _ in range(3)]
    assert_example(FISHER(None, [BASE] * 3, statistics=fishers), BASE.tolist())
    one = FISHER(None, MODELS, weights=[1, 2, 4], statistics=fishers)
    assert torch.equal(one, FISHER(None, MODELS, weights=[8, 16, 32], statistics=fishers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_no_bit_depends_on_chunks_or_threads(dtype, monkeypatch):
    model = make_model(dtype, shapes={"a": (70, 150), "b": (3, 5)})
    statistics = fishers_of(model)
    whole = merge_model("fisher", model, statistics=statistics)
    monkeypatch.setattr(sweep_module, "SWEEP_ELEMENTS", 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same_bits(merge_model("fisher", model, chunk=777, statistics=statistics), whole)
    finally:
        torch.set_num_threads(threads)
    assert vector(whole).dtype == dtype


BAD = [
    (
        [torch.ones(2), None],
        {},
        "each model to have statistics of tensor 'a', got none from model 1",
    ),
    ([torch.ones(2), torch.ones(3)], {}, r"tensor 'a' of shape \[2\], got \[3\] from model 1"),
    ([torch.ones(2)] * 2, {"weights": [1, -1]}, "weights with a sum other than 0"),
    ([torch.ones(2)] * 2, {"f0": -1}, "expected f0 to be a number of at least 0, got -1"),
]


@pytest.mark.parametrize("statistics, options, message", BAD, ids=str)
def test_refuses(statistics, options, message):
    with pytest.raises(ValueError, match=f"^fisher: .*{message}"):
        FISHER(None, THETA, statistics=statistics, tensor_name="a", normalize=False, **options)
