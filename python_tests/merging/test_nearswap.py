import math

import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import DTYPES, assert_close, assert_example, flat, make

NEARSWAP = get("nearswap")


def test_worked_example():
    out = NEARSWAP(torch.ones(4), [torch.tensor([1.001, 1.02, 1, 0.5])], t=0.01)
    assert_example(out, [1.001, 1.01, 1, 0.99])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0, 1e-4, 0.1, 10])
def test_matches_loop(dtype, t):
    base, (model, *_) = make(dtype)
    out = NEARSWAP(base, [model], t=t)
    assert_close(out, reference.nearswap(flat(base), flat(model), t), terms=8)


def test_degenerate_cases():
    base, (model, *_) = make(torch.float32)
    assert torch.equal(NEARSWAP(base, [model], t=0), base)
    assert torch.equal(NEARSWAP(base, [model], t=100), model)
    assert torch.equal(NEARSWAP(base, [base], t=0.1), base)
    far = NEARSWAP(base, [base + 1], t=0.25)
    torch.testing.assert_close(far, base + 0.25)
    model[0, 0] = math.nan
    assert NEARSWAP(base, [model], t=0.1)[0, 0].isnan()


def test_bad_requests():
    base, models = make(torch.float32)
    with pytest.raises(ValueError, match="nearswap: expected 1 model besides the base, got 3"):
        NEARSWAP(base, models, t=1)
    with pytest.raises(TypeError, match="nearswap: expected parameter t, which has no default"):
        NEARSWAP(base, models[:1])
    with pytest.raises(ValueError, match="nearswap: expected t to be a finite number of at least"):
        NEARSWAP(base, models[:1], t=-1)
