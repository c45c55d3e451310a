import pytest
import torch

from mergeme_ext.merging import get
from python_tests.merging.test_dare_linear import EXAMPLE
from python_tests.references import merge_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

DARE_TIES = get("dare_ties")


def test_worked_example():
    out = DARE_TIES(BASE, MODELS, **EXAMPLE)
    assert_example(out, [2.161538, -0.317308, 1.7, 1.2375, 2.4, -1.168269])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_loop(dtype, elect, normalize):
    base, models = make(dtype)
    weights, density = [0.2, 0.5, 1.0], [0.3, 0.8, 0.5]
    options = {"rescale": "none", "elect": elect, "normalize": normalize, "seed": 7, "lam": 0.4}
    out = DARE_TIES(base, models, weights=weights, density=density, tensor_name="n", **options)
    models = [flat(m) for m in models]
    expected = reference.dare(flat(base), models, weights, density, name="n", **options)
    assert_close(out, expected, terms=20)


def test_degenerate_cases():
    assert torch.equal(DARE_TIES(BASE, MODELS[:1], weights=1), MODELS[0])
    assert torch.equal(DARE_TIES(BASE, [BASE, BASE], weights=1, density=0.5), BASE)
    whole = DARE_TIES(BASE, MODELS, weights=1, normalize=True)
    assert torch.equal(whole, get("ties")(BASE, MODELS, weights=1))
