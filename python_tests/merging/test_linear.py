import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import merge_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

LINEAR = get("linear")


def test_worked_example():
    out = LINEAR(None, MODELS[:2], weights=[1, 2])
    assert_example(out, [1, -2.291667, 1.166667, 0.333333, 2.458333, -0.979167])
    out = LINEAR(None, MODELS[:2], weights=[1, 2], normalize=False)
    assert_example(out, [3, -6.875, 3.5, 1, 7.375, -2.9375])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, -0.5, 1.0]], ids=str)
def test_matches_loop(dtype, normalize, weights):
    _, models = make(dtype)
    out = LINEAR(None, models, weights=weights, normalize=normalize)
    assert out.dtype == dtype
    assert_close(out, reference.linear([flat(m) for m in models], weights, normalize), terms=5)


def test_degenerate_cases():
    assert torch.equal(LINEAR(None, MODELS[:1], weights=3), MODELS[0])
    assert torch.equal(LINEAR(None, [BASE] * 4, weights=1), BASE)
    assert torch.equal(LINEAR(None, MODELS[:2], weights=[1, 0]), MODELS[0])
    with pytest.raises(ValueError, match="linear: expected weights with a sum other than 0"):
        LINEAR(None, MODELS[:2], weights=[1, -1])
