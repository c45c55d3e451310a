import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, flat, make

DELLA = get("della_linear")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", ["none", "inverse_prob", "l1", "l2", "linf"])
def test_matches_loop(dtype, normalize, rescale):
    base, models = make(dtype)
    weights, density, epsilon = [0.2, -0.5, 1.0], [0.3, 0.8, 1.0], [0.1, 0.19, 0.15]
    options = {"rescale": rescale, "normalize": normalize, "seed": 5, "lam": 0.4}
    named = {"density": density, "epsilon": epsilon, "tensor_name": "x.weight"}
    out = DELLA(base, models, weights=weights, **named, **options)
    expected = reference.della(
        *(flat(base), [flat(m) for m in models], base.shape[-1], weights, density, epsilon),
        **options,
        name="x.weight",
        elect="none",
    )
    assert_close(out, expected, terms=22 if rescale in ("none", "inverse_prob") else 160)


def test_masks_are_those_of_della():
    options = {"weights": 1, "density": 0.5, "rescale": "none", "seed": 4, "tensor_name": "w"}
    base, models = make(torch.float32, models=1)
    one = get("della")(base, models, **options)
    assert torch.equal(DELLA(base, models, **options), one) and not torch.equal(one, base)


def test_degenerate_cases():
    same = get("task_arithmetic")(BASE, MODELS, weights=1)
    assert torch.equal(DELLA(BASE, MODELS, weights=1), same)
    assert torch.equal(DELLA(BASE, [BASE, BASE], weights=1, density=0.5), BASE)
    with pytest.raises(ValueError, match="density - epsilon above 0"):
        DELLA(BASE, MODELS, weights=1, density=0.1)
