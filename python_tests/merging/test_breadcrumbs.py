import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

BREADCRUMBS = get("breadcrumbs")
X = [5, -4, 3, -2, 1, 0.5, 0.25, -0.1, 0.05, 0.01]


@pytest.mark.parametrize("gamma, kept", [(0.2, (2, 8)), (0.5, (4, 10)), (0, (0, 6)), (1, (4, 10))])
def test_worked_example(gamma, kept):
    out = BREADCRUMBS(torch.zeros(10), [torch.tensor(X)], weights=1, density=0.6, gamma=gamma)
    assert_example(out, [x if kept[0] <= i < kept[1] else 0.0 for i, x in enumerate(X)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", ["none", "inverse_prob", "l1", "l2", "linf"])
def test_matches_loop(dtype, normalize, rescale):
    base, models = make(dtype)
    weights, density, gamma = [0.2, -0.5, 1.0], [0.3, 0.9, 1.0], [0.1, 0.25, 0.5]
    options = {"rescale": rescale, "normalize": normalize, "lam": 0.4}
    out = BREADCRUMBS(base, models, weights=weights, density=density, gamma=gamma, **options)
    flats = [flat(m) for m in models]
    expected = reference.breadcrumbs(flat(base), flats, weights, density, gamma, **options)
    assert_close(out, expected, terms=20 if rescale in ("none", "inverse_prob") else 150)


def test_small_tensors_keep_what_gamma_does_not_reach():
    """One in a hundred of these rounds to none: nothing large is dropped."""
    base, (model, *_) = make(torch.float32, shape=(50,))
    out = BREADCRUMBS(base, [model], weights=1, density=0.5)
    largest = (model - base).abs().topk(25).indices
    assert (out != base).sum() == 25 and torch.equal(
        out[largest].bfloat16(), model[largest].bfloat16()
    )


def test_ties_go_to_the_lower_index():
    base, model = torch.zeros(10), torch.ones(10)
    out = BREADCRUMBS(base, [model], weights=1, density=0.4, gamma=0.3)
    assert out.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_degenerate_cases():
    same = get("task_arithmetic")(BASE, MODELS, weights=1)
    assert torch.equal(BREADCRUMBS(BASE, MODELS, weights=1), same)  # a density of 1 drops nothing
    assert torch.equal(BREADCRUMBS(BASE, [BASE, BASE], weights=1, density=0.5), BASE)
    one = torch.ones(1)
    assert BREADCRUMBS(one, [one + 1], weights=1, density=0.1, gamma=1).tolist() == [2]
    empty = torch.empty(0, 3)
    assert BREADCRUMBS(empty, [empty], weights=1, density=0.5).shape == (0, 3)
