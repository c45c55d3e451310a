import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.merging import get
from mergeme_ext.merging import sweep as sweep_module
from python_tests.references import whole_model as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example
from python_tests.support.whole_model import (
    joined,
    make_model,
    merge_model,
    same_bits,
    split_model,
    survey_model,
    vector,
)

EMR = get("emr_merging")


def test_worked_example():
    unified = EMR(BASE, MODELS) - BASE
    assert_example(unified, [0.5, 0.625, 1, 0.75, -0.625, -0.0625])
    factors = [
        survey_model("emr_merging", {"a": (BASE, MODELS)}, {"task": m})[0]["factor"]
        for m in range(3)
    ]
    assert factors == pytest.approx([1.1, 0.947368, 1], abs=1e-6)
    out = EMR(BASE, MODELS, task=1) - BASE
    assert_example(out, [0, 0, 0.947368, 0.710526, -0.592105, 0])
    assert_example(EMR(BASE, MODELS, task=0) - BASE, [0.55, 0, 0, 0.825, -0.6875, 0])
    assert_example(EMR(BASE, MODELS, task=2) - BASE, [0.5, 0.625, 1, 0, 0, -0.0625])


@pytest.mark.parametrize("stat, factor", [("mean_of_means", 0.631579), ("global_sum", 0.727273)])
def test_worked_example_of_the_statistics(stat, factor):
    deltas = torch.tensor([[1, 1, 0.5, 0.5, 0.5, 0.5], [1, 3, 0.5, -0.5, 0.5, 0.5]])
    model = split_model(torch.zeros(6), list(deltas), [2, 4])
    parameters = {"task": 0, "rescale_stat": stat}
    survey, rounds = survey_model("emr_merging", model, parameters)
    assert rounds == 1 and survey["factor"] == pytest.approx(factor, abs=1e-6)


def test_a_total_of_zero_elects_minus():
    base = torch.zeros(2)
    tuned = [torch.tensor([1.0, 0.25]), torch.tensor([-0.5, -0.25]), torch.tensor([-0.5, 0.0])]
    assert EMR(base, tuned).tolist() == [-0.5, -0.25]


def test_a_mask_that_is_false_everywhere_gives_the_base():
    base = torch.tensor([1.0, 2.0])
    tuned = [base + 1, base - 0.5]
    assert torch.equal(EMR(base, tuned, task=1), base)
    assert torch.equal(EMR(base, [base, base], task=0), base)
    assert torch.equal(EMR(base, [base, base]), base)


def test_one_model_is_itself():
    model = make_model(torch.float32, models=1)
    base, (tuned,) = joined(model)
    for task in ("unified", 0):
        assert_close(
            vector(merge_model("emr_merging", model, task=task)),
            (tuned.tolist(), (base.abs() + tuned.abs()).tolist()),
            terms=10,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("task", ["unified", 0, 2])
@pytest.mark.parametrize("stat", ["mean_of_means", "global_sum"])
def test_matches_formula(dtype, task, stat):
    model = make_model(dtype)
    out = merge_model("emr_merging", model, task=task, rescale_stat=stat)
    for name, (base, tensors) in model.items():
        if base.numel() == 0:
            continue
        unified, masks = reference.unify([t.double() - base.double() for t in tensors])
        if task != "unified":
            unified = unified * masks[task] * reference.emr_factor(model, task, stat)
        size = base.double().abs() + unified.abs()
        expected = base.double() + unified
        assert_close(out[name], (expected.flatten().tolist(), size.flatten().tolist()), terms=20)


@given(seed=st.integers(0, 2**31), chunk=st.integers(1, 30), models=st.integers(1, 5))
def test_ties_in_exact_arithmetic(seed, chunk, models):
    """Whole numbers over two: totals of zero abound, and every step but the factor is exact."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, (20,), generator=g).float()
    tuned = [base + torch.randint(-2, 3, (20,), generator=g) / 2 for _ in range(models)]
    model = split_model(base, tuned, [13, 7])
    out = vector(merge_model("emr_merging", model, chunk=chunk))
    unified, _ = reference.unify([t - base for t in tuned])
    assert torch.equal(out, base + unified)
    survey, _ = survey_model("emr_merging", model, {"task": 0, "rescale_stat": "global_sum"})
    expected = reference.emr_factor(model, 0, "global_sum")
    assert survey["factor"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("task", ["unified", 1])
def test_no_bit_depends_on_chunks_or_threads(task, monkeypatch):
    model = make_model(torch.bfloat16, shapes={"a": (70, 150), "b": (3, 5)})
    whole = merge_model("emr_merging", model, task=task)
    monkeypatch.setattr(sweep_module, "SWEEP_ELEMENTS", 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same_bits(merge_model("emr_merging", model, chunk=777, task=task), whole)
    finally:
        torch.set_num_threads(threads)


def test_unified_needs_no_survey_and_tasks_leave_a_note():
    model = make_model(torch.float32)
    assert survey_model("emr_merging", model, {}) == ({}, 0)
    notes = {}
    merge_model("emr_merging", model, task=1, notes=notes)
    assert notes["factor"] == pytest.approx(reference.emr_factor(model, 1, "mean_of_means"))


def test_refuses():
    with pytest.raises(ValueError, match=r"expected task to be unified, or .* in \[0, 3\), got 3"):
        EMR(BASE, MODELS, task=3)
    with pytest.raises(ValueError, match=r"^emr_merging: expected a survey of the whole model"):
        EMR.prepare(BASE, MODELS, EMR.bind(3, {"task": 0}))
