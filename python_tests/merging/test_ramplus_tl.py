import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

RAM = get("ramplus_tl")


def test_worked_example():
    deltas = torch.tensor([[0.4, 0, 0, 0.2], [0, 0.3, 0, 0.4], [0, 0, 0, 0]])
    assert_example(RAM(torch.zeros(4), list(deltas)), [0.408, 0.306, 0, 0.3])
    notes = {}
    RAM.prepare(torch.zeros(4), list(deltas), RAM.bind(3, {}), notes=notes)
    assert notes == {"scales": pytest.approx([1.02, 1.02, 1.0])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r, alpha", [(0.1, 0.2), (0.5, 10), (0, 1)])
def test_matches_loop(dtype, r, alpha):
    base, models = make(dtype)
    g = torch.Generator().manual_seed(3)
    for m in models:
        same = torch.rand(base.shape, generator=g) < 0.6
        m[same] = base[same]
    out = RAM(base, models, r=r, alpha=alpha)
    expected = reference.ram(flat(base), [flat(m) for m in models], r=r, alpha=alpha)
    assert_close(out, expected, terms=12)


def test_degenerate_cases():
    assert torch.equal(RAM(BASE, MODELS, r=0), get("ram")(BASE, MODELS))
    assert torch.equal(RAM(BASE, [BASE, BASE]), BASE)
    assert torch.equal(RAM(BASE, MODELS[:1]), MODELS[0])
    assert torch.equal(RAM(BASE, MODELS, epsilon=0, r=0), get("ram")(BASE, MODELS, epsilon=0))
    empty = torch.empty(0, 3)
    assert RAM(empty, [empty]).shape == (0, 3)
