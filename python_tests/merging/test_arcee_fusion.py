import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import DTYPES, assert_example, flat, in_chunks, make

FUSION = get("arcee_fusion")


def test_worked_example():
    base = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]])
    model = base + torch.tensor([[0.1, 0, -0.1, 0], [2, 0, 0, 0.5]])
    notes = {}
    FUSION.prepare(base, [model], {}, notes=notes)
    assert notes == {"importance": pytest.approx(0.000375, abs=1e-6)}
    assert_example(FUSION(base, [model]), [[0, 0, 0, 0], [3, 1, 1, 1.5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 13), (40,), (2, 3, 7), (5, 1), (1,), ()], ids=str)
def test_matches_loop(dtype, shape):
    base, (model, *_) = make(dtype, shape=shape)
    out = FUSION(base, [model])
    length = shape[-1] if shape else 1
    taken, scores, threshold = reference.arcee_fusion(flat(base), flat(model), length)
    # Importances are rounded to the accumulation type; those that near the threshold may go over.
    near = [s != threshold and abs(s - threshold) <= 1e-5 * threshold for s in scores]
    assert not any(near), "choose a seed without near ties"
    assert flat(out) == taken


def test_mostly_equal_tensors_are_taken_whole():
    base, (model, *_) = make(torch.float32)
    model = torch.where(
        torch.rand(base.shape, generator=torch.Generator().manual_seed(1)) < 0.2, model, base
    )
    model[3:] = base[3:]
    assert torch.equal(FUSION(base, [model]), model)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    length=st.integers(1, 40),
    chunk=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_chunks_change_no_bit(rows, length, chunk, dtype, seed):
    base, (model,) = make(dtype, shape=(rows, length), models=1, seed=seed)
    whole = FUSION(base, [model])
    assert ((whole == base) | (whole == model)).all()
    assert torch.equal(in_chunks(FUSION, base, [model], chunk), whole)


def test_stretches_of_a_sweep_and_threads_change_nothing(monkeypatch):
    from mergeme_ext.merging import sweep
    from mergeme_ext.merging.methods import arcee_fusion

    base, (model, *_) = make(torch.bfloat16, shape=(64, 1000))
    threads = torch.get_num_threads()
    notes = [{} for _ in range(4)]
    outs = []
    try:
        for n, (stretch, count) in enumerate([(2**17, 1), (2**17, 2), (5000, 1), (999, 2)]):
            torch.set_num_threads(count)
            monkeypatch.setattr(sweep, "SWEEP_ELEMENTS", stretch)
            monkeypatch.setattr(arcee_fusion, "SWEEP_ELEMENTS", stretch, raising=False)
            FUSION.prepare(base, [model], {}, notes=notes[n])
            outs.append(FUSION(base, [model]))
    finally:
        torch.set_num_threads(threads)
    assert all(n == notes[0] for n in notes) and all(torch.equal(o, outs[0]) for o in outs)


def test_degenerate_cases():
    base, (model, *_) = make(torch.float32)
    assert torch.equal(FUSION(base, [base]), base)
    assert FUSION(torch.empty(0, 3), [torch.empty(0, 3)]).shape == (0, 3)
    assert FUSION(torch.empty(3, 0), [torch.empty(3, 0)]).shape == (3, 0)
    with pytest.raises(ValueError, match="arcee_fusion: expected 1 model besides the base, got 2"):
        FUSION(base, [model, model])
    model[2, 3] = math.nan
    assert FUSION(base, [model])[2, 3].isnan()


@pytest.mark.parametrize("seed", range(8))
def test_a_vectors_elements_on_the_threshold_are_taken(seed):
    # Distances 0 to 3 in halves: the quartiles are 0, 0 and 1, so the threshold is at 1.5.
    generator = torch.Generator().manual_seed(seed)
    distance = torch.tensor([0.0] * 500 + [1.0] * 300 + [1.5] * 150 + [3.0] * 50)
    distance = distance[torch.randperm(1000, generator=generator)]
    base = torch.randint(-64, 64, (1000,), generator=generator) / 64
    tensor = base + distance * 2**-9
    out = FUSION(base, [tensor])
    assert torch.equal(out != base, distance >= 1.5)
