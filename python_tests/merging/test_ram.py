import math

import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

RAM = get("ram")


def test_worked_examples():
    out = RAM(BASE, MODELS)
    assert_example(out, [1.125, -1.958333, 1.125, 0.041667, 2.75, -1])
    deltas = torch.tensor([[0.4, 0, 0, 0.2], [0, 0.3, 0, 0.4], [0, 0, 0, 0]])
    assert_example(RAM(torch.zeros(4), list(deltas)), [0.4, 0.3, 0, 0.3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0, 1e-5, 0.2])
def test_matches_loop(dtype, epsilon):
    base, models = make(dtype)
    models[0][::2] = base[::2]
    out = RAM(base, models, epsilon=epsilon)
    expected = reference.ram(flat(base), [flat(m) for m in models], epsilon)
    assert_close(out, expected, terms=9)


def test_degenerate_cases():
    assert torch.equal(RAM(BASE, [BASE, BASE]), BASE)
    assert torch.equal(RAM(BASE, MODELS[:1]), MODELS[0])
    assert torch.equal(RAM(BASE, MODELS, epsilon=10), BASE)
    models = [m.clone() for m in MODELS]
    models[2][1] = math.nan
    assert RAM(BASE, models)[1].isnan()
