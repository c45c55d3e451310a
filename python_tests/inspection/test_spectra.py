import math

import pytest
import torch

from mergeme_ext.inspection.spectra import TOP, row_ranges, spectrum_of, top_singular_values
from mergeme_ext.io.operands import Stored


def operand(tensor):
    return Stored(tensor)


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (31, 64)])
def test_decaying_spectrum_is_found(shape):
    u, _, vt = torch.linalg.svd(matrix(shape), full_matrices=False)
    sizes = 0.8 ** torch.arange(min(shape), dtype=torch.float64)
    base = matrix(shape, seed=1)
    model = base + u * sizes @ vt
    values, norm = top_singular_values(operand(base), operand(model), seed=3, chunk_elements=500)
    torch.testing.assert_close(torch.tensor(values).double(), sizes[:TOP], rtol=1e-6, atol=0)
    assert norm == pytest.approx(float(sizes.norm()), rel=1e-12)


def test_noise_is_nearly_found_and_from_below():
    noise = matrix((600, 400))
    expected = torch.linalg.svdvals(noise)[:TOP]
    values, _ = top_singular_values(None, operand(noise), seed=0, chunk_elements=4000)
    ratio = torch.tensor(values, dtype=torch.float64) / expected
    assert (ratio <= 1 + 1e-12).all() and (ratio > 0.96).all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank(rank):
    x = matrix((50, rank)) @ matrix((rank, 40), seed=1)
    values, norm = top_singular_values(None, operand(x), seed=0, chunk_elements=7)
    expected = torch.linalg.svdvals(x)[:TOP]
    got = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-6 * (norm + 1))


@pytest.mark.parametrize("shape", [(2, 2), (3, 100), (100, 3)])
def test_small_matrices_are_exact(shape):
    x = matrix(shape)
    values, _ = top_singular_values(None, operand(x), seed=0, chunk_elements=10)
    expected = torch.linalg.svdvals(x)[:TOP]
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected)


def test_derived_figures():
    x = torch.diag(torch.tensor([3.0, 4.0] + [0.0] * 18))
    found = spectrum_of("t", "k", 1, 0, (None, operand(x)), seed=0, chunk_elements=64)
    assert found.singular_values[:2] == pytest.approx((4, 3))
    assert found.stable_rank == pytest.approx(25 / 16) and found.energy == pytest.approx(1)
    zero = spectrum_of("t", "k", 1, 0, (operand(x), operand(x)), seed=0, chunk_elements=64)
    assert set(zero.singular_values) == {0} and math.isnan(zero.stable_rank + zero.energy)


def test_non_finite_elements_are_zero():
    x = matrix((20, 20))
    spoilt = x.clone()
    spoilt[3, 4] = math.nan
    x[3, 4] = 0
    options = {"seed": 0, "chunk_elements": 64}
    assert top_singular_values(None, operand(spoilt), **options) == top_singular_values(
        None, operand(x), **options
    )


def test_row_ranges():
    assert row_ranges(operand(torch.zeros(5, 4)), 8) == [(0, 2), (2, 4), (4, 5)]
    assert row_ranges(operand(torch.zeros(2, 100)), 8) == [(0, 1), (1, 2)]
    assert row_ranges(operand(torch.zeros(())), 8) == [(0, 1)]
    assert row_ranges(operand(torch.zeros(3, 0)), 8) == []
