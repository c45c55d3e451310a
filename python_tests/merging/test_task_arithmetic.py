import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import merge_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

METHOD = get("task_arithmetic")


def test_worked_example():
    out = METHOD(BASE, MODELS, weights=1, lam=0.5)
    assert_example(out, [1.1875, -1.9375, 1.125, 0.0625, 2.625, -1])
    out = METHOD(BASE, MODELS, weights=[1, 2, 1], normalize=True)
    assert_example(out, [1.03125, -2.0625, 1.0625, 0.0625, 2.6875, -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, -0.5, 1.0]], ids=str)
def test_matches_loop(dtype, normalize, weights):
    base, models = make(dtype)
    out = METHOD(base, models, weights=weights, normalize=normalize, lam=0.7)
    deltas = reference.task_vectors(flat(base), [flat(m) for m in models])
    expected = reference.combine(flat(base), deltas, weights, "none", normalize, 0.7)
    assert_close(out, expected, terms=12)


def test_degenerate_cases():
    assert torch.equal(METHOD(BASE, [BASE, BASE], weights=1), BASE)
    assert torch.equal(METHOD(BASE, MODELS, weights=0), BASE)
    assert torch.equal(METHOD(BASE, MODELS[:1], weights=1), MODELS[0])
    assert torch.equal(METHOD(BASE, MODELS[:1], weights=-1), BASE - DELTA0)
    with pytest.raises(ValueError, match="task_arithmetic: expected a base, got None"):
        METHOD(None, MODELS, weights=1)


DELTA0 = MODELS[0] - BASE
