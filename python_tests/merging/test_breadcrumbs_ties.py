import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, flat, make

BREADCRUMBS = get("breadcrumbs_ties")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_matches_loop(dtype, elect, normalize, rescale):
    base, models = make(dtype)
    weights, density, gamma = [0.2, 0.5, 1.0], [0.3, 0.9, 1.0], [0.1, 0.25, 0.5]
    options = {"rescale": rescale, "normalize": normalize, "elect": elect, "lam": 0.4}
    out = BREADCRUMBS(base, models, weights=weights, density=density, gamma=gamma, **options)
    flats = [flat(m) for m in models]
    expected = reference.breadcrumbs(flat(base), flats, weights, density, gamma, **options)
    assert_close(out, expected, terms=20 if rescale == "none" else 150)


def test_without_a_top_it_is_ties():
    base, models = make(torch.float32)
    options = {"weights": [0.2, 0.5, 1.0], "density": 0.3, "normalize": True}
    assert torch.equal(
        BREADCRUMBS(base, models, **options, gamma=0), get("ties")(base, models, **options)
    )


def test_degenerate_cases():
    same = get("ties")(BASE, MODELS, weights=1, normalize=False)
    assert torch.equal(BREADCRUMBS(BASE, MODELS, weights=1), same)
    assert torch.equal(BREADCRUMBS(BASE, [BASE, BASE], weights=1, density=0.5), BASE)
