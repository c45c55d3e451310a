import pytest
import torch

from mergeme_ext.merging import get
from mergeme_ext.merging import sweep as sweep_module
from mergeme_ext.merging.methods import pcb_merging as module
from python_tests.references import whole_model as reference
from python_tests.support.tolerance import assert_as_good_as_eager
from python_tests.support.toy import BASE, DELTAS, DTYPES, MODELS, assert_example
from python_tests.support.whole_model import (
    joined,
    make_model,
    merge_model,
    same_bits,
    survey_model,
    vector,
)

PCB = get("pcb_merging")
SHAPES = {"a": (40, 60), "b": (130,), "c": (9, 11), "empty": (0, 4)}


def test_worked_example_of_the_scores():
    lows, highs = [0.0] * 3, DELTAS.abs().amax(1).tolist()
    _, scores = module._scores(list(DELTAS), lows, highs, "sum")
    intra = [3.793668, 1.086904, 1, 20.085537, 8.031195, 1.021052]
    inter = [0.185333, -0.015624, 0, 0.093476, 0.437189, 0]
    assert_example(scores[0], [a * b for a, b in zip(intra, inter, strict=True)])


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_worked_example(scope):
    out = PCB(BASE, MODELS, density=0.5, clip=0, scope=scope) - BASE
    assert_example(out, [0, 0.625, 0.712966, 0.75, -0.619777, 0])
    out = PCB(BASE, MODELS, density=0.5, clip=0, inter="sign_mm", scope=scope) - BASE
    assert_example(out, [0, 0.625, 0.843183, 0.75, -0.619042, 0])


def test_the_upper_clip_takes_the_largest_element_at_least():
    survey, _ = survey_model("pcb_merging", {"a": (BASE, MODELS)}, {"clip": 1e-4})
    assert survey["high"][0] == 0.625 and survey["low"][0] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inter", ["sum", "sign_mm"])
@pytest.mark.parametrize("clip", [0, 0.01])
def test_matches_sorted_formula(dtype, inter, clip):
    model = make_model(dtype, shapes=SHAPES)
    options = {"density": [0.1, 0.3, 1.0], "clip": clip, "inter": inter}
    options |= {"weights": [0.5, 1, 1.2], "lam": 0.9}
    out = vector(merge_model("pcb_merging", model, **options))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    args = joined(model)
    exact = reference.pcb(*args, **options)
    assert_as_good_as_eager(out, exact, reference.pcb(*args, **options, work=work))


def test_by_tensor_is_another_merge():
    model = make_model(torch.float32, shapes=SHAPES)
    assert survey_model("pcb_merging", model, {"scope": "tensor"}) == ({}, 0)
    own = merge_model("pcb_merging", model, scope="tensor", density=0.2)
    alone = {n: merge_model("pcb_merging", {n: t}, density=0.2)[n] for n, t in model.items()}
    assert same_bits(own, alone)
    assert not same_bits(own, merge_model("pcb_merging", model, density=0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_no_bit_depends_on_chunks_or_threads(dtype, scope, monkeypatch):
    model = make_model(dtype, shapes={**SHAPES, "long": (70001,)})
    whole = merge_model("pcb_merging", model, density=0.2, scope=scope)
    threads = torch.get_num_threads()
    for sweep_elements, chunk, count in ((4096, 777, 2), (1000, 30011, 1)):
        monkeypatch.setattr(sweep_module, "SWEEP_ELEMENTS", sweep_elements)
        torch.set_num_threads(count)
        try:
            other = merge_model("pcb_merging", model, chunk=chunk, density=0.2, scope=scope)
            assert same_bits(other, whole)
        finally:
            torch.set_num_threads(threads)


def test_rows_that_are_constant():
    """Equal magnitudes have no range to normalize by; equal scores leave no share."""
    base = torch.zeros(4)
    one = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert torch.equal(PCB(base, [one], density=0.5, clip=0), base)
    other = torch.tensor([1.0, 2.0, 0.0, 0.0])
    out = PCB(base, [one, other], density=0.5, clip=0)
    assert out.isfinite().all() and out[0] == 1
    assert torch.equal(PCB(base, [base, base], density=0.5), base)


def test_density_one_and_one_element():
    base = torch.zeros(1)
    assert torch.equal(PCB(base, [base + 1, base + 2], density=1.0), base)
    out = PCB(BASE, MODELS, density=1.0, clip=0)
    exact = reference.pcb(
        BASE, MODELS, density=[1.0] * 3, clip=0, inter="sum", weights=[1.0] * 3, lam=1
    )
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


def test_sweeps_and_errors():
    model = make_model(torch.float32)
    _, rounds = survey_model("pcb_merging", model, {})
    assert rounds == 4  # two sweeps of two rounds
    with pytest.raises(ValueError, match=r"^pcb_merging: expected a survey of the whole model"):
        PCB.prepare(BASE, MODELS, PCB.bind(3, {}))
    survey, _ = survey_model("pcb_merging", model, {"density": 0.3})
    with pytest.raises(ValueError, match=r"expected the same density for all tensors"):
        PCB.prepare(BASE, MODELS, PCB.bind(3, {}), survey=survey)
    with pytest.raises(ValueError, match=r"expected clip to be a fraction in \[0, 0.5\), got 0.5"):
        PCB(BASE, MODELS, clip=0.5)
