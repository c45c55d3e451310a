import itertools
import os
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references import topk_gating as reference
from python_tests.support.backends import BACKENDS, CPU, CUDA, SCHEDULES, SIMT, backends_with_errors
from python_tests.support.tolerance import assert_within_rounding

OP = "topk_gating"
BACKWARD = "topk_gating_backward"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (T, E, K): empty, one of one, odd sizes, all experts, more slots than lanes, and each of the
# kernel's variants (up to 64, 256, 1024 experts, and beyond) at its edges.
CASES = [(0, 4, 2), (1, 1, 1), (5, 8, 2), (6, 33, 33), (3, 64, 8), (2, 65, 40), (2, 257, 3)]
LARGE = [(1, 256, 8), (1, 1024, 5), (2, 1025, 4)]
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
MODES = list(itertools.product(SCORES, (True, False), (False, True)))
MODE_IDS = [f"{s}-{'renorm' if r else 'plain'}-{'bias' if b else 'nobias'}" for s, r, b in MODES]


def make(tokens, num_experts, dtype, device="cpu", seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, num_experts, generator=g, dtype=torch.float64)
    bias = 0.3 * torch.randn(num_experts, generator=g)
    return logits.to(dtype).to(device), bias.to(device)


def roundings(logits):
    """Bounds a weight's relative error, in units of roundoff.

    A share is an exponential (4) of a rounded difference (its size), with sigmoid over 1 + an
    exponential (6), with sqrtsoftplus times the root (half, and 1) of a logarithm's ratio (3, and 4
    of its exponential) or of that added to the logit (2). A weight is such a share over the sum of
    E of them (each again as wrong, and E / 32 + 5 additions), divided and scaled (2).
    """
    largest = logits.double().abs().max().item() if logits.numel() else 0.0
    return 2 * (10 + 2 * largest) + logits.shape[1] / 32 + 7


def assert_picks_largest(keys, picked_ids, slack):
    """Rows of ``picked_ids`` are in descending order of ``keys``, and the largest, up to slack."""
    picked = keys.gather(1, picked_ids.long())
    rest = keys.scatter(1, picked_ids.long(), -torch.inf)
    assert torch.isinf(rest).sum() == torch.isinf(keys).sum() + picked_ids.numel(), "not distinct"
    assert (picked.diff(dim=1) <= slack).all()
    if len(keys):
        assert (rest.amax(1) <= picked.amin(1) + slack).all()


def assert_correct(out, logits, bias, top_k, score, renormalize, scale, groups=None):
    """``groups``: (num_groups, top_groups, group_score), which must not be near a tie."""
    ids, weights = (t.cpu() for t in out)
    wide = logits.dtype == torch.float64
    assert ids.dtype == torch.int32 and weights.dtype == (torch.float64 if wide else torch.float32)
    assert ids.shape == weights.shape == (logits.shape[0], top_k)
    keys = reference.selection_scores(logits, bias, score)
    if groups is not None:
        num_groups, top_groups, group_score = groups
        summed = reference.scores(logits, score) + (0 if bias is None else bias.double().cpu())
        ranked = reference.group_scores(summed, num_groups, group_score)
        chosen = reference.select(ranked, top_groups)
        closed = ~reference.open_experts(chosen, num_groups, logits.shape[1])
        keys = keys.masked_fill(closed, -torch.inf)
    if bias is None:
        assert torch.equal(ids, reference.select(keys, top_k))
    else:  # a rounded score may swap with one that is closer than the rounding
        size = keys[keys.isfinite()].abs().max().clamp(min=1) if keys.numel() else 1
        slack = 2 * (roundings(logits) + 1) * size * (2.0**-53 if wide else 2.0**-24)
        assert_picks_largest(keys, ids, slack)
    expected = reference.gate_weights(logits, ids, score, renormalize, scale)
    magnitude = expected.abs()
    if score == "none" and renormalize:  # the sum cancels
        picked = logits.double().cpu().gather(1, ids.long())
        magnitude = magnitude * (picked.abs().sum(1) / picked.sum(1).abs())[:, None]
    assert_within_rounding(weights, expected, magnitude, terms=roundings(logits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, num_experts, top_k", CASES)
def test_matches_reference(backend, dtype, tokens, num_experts, top_k):
    logits, bias = make(tokens, num_experts, dtype, backend.device)
    for score, renormalize, biased in MODES:
        args = (logits, bias if biased else None, top_k)
        out = backend.op(OP)(*args, score=score, renormalize=renormalize, scale=2.5)
        assert_correct(out, *args, score, renormalize, 2.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, num_experts, top_k", LARGE)
def test_many_experts(backend, dtype, tokens, num_experts, top_k):
    logits, bias = make(tokens, num_experts, dtype, backend.device)
    for b in (None, bias):
        out = backend.op(OP)(logits, b, top_k)
        assert_correct(out, logits, b, top_k, "softmax", True, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_experts_on_the_cpu(dtype):
    logits, bias = make(3, 5003, dtype)
    for b, top_k in ((None, 5003), (bias, 70)):
        out = CPU.op(OP)(logits, b, top_k, score="sigmoid")
        assert_correct(out, logits, b, top_k, "sigmoid", True, 1.0)


# (T, E, K, groups, top groups): DeepSeek-V3's, a group of one expert, groups that end within a
# warp's step, all groups, more groups than lanes, and more experts than registers hold.
GROUPED = [
    (2, 256, 8, 8, 4),
    (3, 6, 2, 6, 3),
    (4, 60, 5, 4, 2),
    (3, 63, 9, 7, 1),
    (2, 24, 24, 3, 3),
    (1, 200, 7, 100, 5),
    (1, 1040, 18, 13, 2),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, num_experts, top_k, num_groups, top_groups", GROUPED)
def test_groups(backend, dtype, tokens, num_experts, top_k, num_groups, top_groups):
    logits, bias = make(tokens, num_experts, dtype, backend.device)
    for group_score, score, b in itertools.product(("max", "top2"), SCORES, (None, bias)):
        if group_score == "top2" and num_groups == num_experts:
            continue
        groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
        for renormalize in (True, False) if group_score == "max" else (True,):
            options = {"score": score, "renormalize": renormalize, "scale": 2.5}
            out = backend.op(OP)(logits, b, top_k, **options, **groups)
            assert_correct(out, logits, b, top_k, **options, groups=(*groups.values(),))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_equal_groups_go_to_the_lower_index(backend, group_score):
    logits = torch.zeros(1, 12, device=backend.device)
    logits[0, 9] = logits[0, 10] = 1.0
    ids, _ = backend.op(OP)(
        logits, None, 5, num_groups=4, top_groups=2, group_score=group_score, score="none"
    )
    assert ids.tolist() == [[9, 10, 0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_outside_the_top_groups_are_never_chosen(backend):
    """Even if the others have negative scores, or a bias of -inf."""
    logits = torch.zeros(1, 8, device=backend.device)
    bias = torch.tensor([-5.0, -6, -5, -5, -9, -9, -9, -9], device=backend.device)
    groups = {"num_groups": 2, "top_groups": 1, "group_score": "top2"}
    ids, _ = backend.op(OP)(logits, bias, 4, score="sigmoid", **groups)
    assert ids.tolist() == [[0, 2, 3, 1]]
    bias[1] = -torch.inf
    ids, weights = backend.op(OP)(logits, bias, 4, score="sigmoid", **groups)
    assert ids.tolist() == [[0, 2, 3, 1]] and weights.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_nan_in_a_poor_group_is_seen(backend, score, group_score, biased):
    logits = torch.tensor([[9.0, 8, 7, 6, -5, -6, -7, torch.nan]], device=backend.device)
    bias = torch.zeros(8, device=backend.device) if biased else None
    groups = {"num_groups": 4, "top_groups": 1, "group_score": group_score}
    ids, weights = backend.op(OP)(logits, bias, 2, score=score, **groups)
    assert weights.isnan().all() and len(set(ids[0].tolist())) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_inputs(backend, dtype):
    logits, bias = make(5, 9, dtype, backend.device)
    ids, weights = backend.op(OP)(logits, bias, 3)
    shifted = torch.cat([logits.flatten()[:1], logits.flatten()])[1:].view(5, 9)
    for z in (logits.t().contiguous().t(), torch.stack([logits, logits], -1)[..., 0], shifted):
        for b in (torch.stack([bias, bias], -1)[:, 0], torch.cat([bias[:1], bias])[1:]):
            out = backend.op(OP)(z, b, 3)
            assert torch.equal(out[0], ids) and torch.equal(out[1], weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_experts", [64, 1025])
def test_equal_scores_go_to_the_lower_index(backend, num_experts):
    logits = torch.zeros(2, num_experts, device=backend.device)
    logits[1, 40:50], logits[1, 3] = 1.0, -0.0
    logits[1, 1] = -1.0
    for bias in (None, torch.full((num_experts,), 0.25, device=backend.device)):
        ids, _ = backend.op(OP)(logits, bias, 14)
        assert ids.tolist() == [[*range(14)], [*range(40, 50), 0, 2, 3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_scores_that_round_to_one_number_keep_their_order(backend, score):
    logits = torch.tensor([[90.0, 100.0, 95.0], [-300.0, -200.0, -250.0]], device=backend.device)
    ids, _ = backend.op(OP)(logits, None, 3, score=score)
    assert ids.tolist() == [[1, 2, 0], [1, 2, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_renormalised_weights_do_not_underflow(backend, dtype, score):
    """Bias selects experts whose own scores are zero in this dtype."""
    logits = torch.tensor([[0.0, -1000.0, -1001.0, -2000.0]], dtype=dtype, device=backend.device)
    bias = torch.tensor([-5.0, 3.0, 2.0, 0.0], device=backend.device)
    ids, weights = backend.op(OP)(logits, bias, 2, score=score)
    assert ids.tolist() == [[1, 2]]
    # Far below 0 the others are the exponential, or its root, of the logit.
    like = logits / 2 if score == "sqrtsoftplus" else logits
    expected = reference.gate_weights(like, ids, "softmax", True, 1.0)
    assert_within_rounding(weights, expected, expected, terms=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score, renormalize, biased", MODES[:12], ids=MODE_IDS[:12])
def test_numbers_that_are_none(backend, score, renormalize, biased):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[0, nan, 1, 2], [nan] * 4, [-inf] * 4, [1, -inf, 2, -inf], [0, 1, inf, 2]],
        device=backend.device,
    ).requires_grad_()
    bias = torch.zeros(4, device=backend.device) if biased else None
    ids, weights = backend.op(OP)(logits, bias, 2, score=score, renormalize=renormalize)
    weights[2:4].sum().backward()
    assert all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in ids.tolist())
    assert weights[:2].isnan().all()
    assert ids[2:4].tolist() == [[0, 1], [2, 0]]
    assert (weights[2] == 0).all() and weights[3].isfinite().all()
    assert logits.grad[2:4].isfinite().all() and (logits.grad[2] == 0).all()
    if score == "softmax":
        assert weights[4].isnan().all()
    else:
        assert ids[4].tolist() == [2, 3]
        assert weights[4].isfinite().all() == (score == "sigmoid")
    if biased:
        bias[1] = nan
        assert backend.op(OP)(logits[3:], bias, 2, score=score)[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_score_and_numbers_that_are_none(backend):
    logits = torch.tensor([[0, torch.nan, 1, 2], [0.0, -0.0, 0, 0], [0, 3, 1, 0]])
    logits = logits.to(backend.device).requires_grad_()
    ids, weights = backend.op(OP)(logits, None, 2, score="none")
    weights[1:].sum().backward()
    assert weights[0].isnan().all() and weights[1].tolist() == [0, 0]
    assert weights[2].tolist() == [0.75, 0.25] and ids[1:].tolist() == [[0, 1], [1, 2]]
    assert logits.grad[1].tolist() == [0, 0, 0, 0] and logits.grad[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score, renormalize, biased", MODES, ids=MODE_IDS)
def test_registration_and_gradient(backend, score, renormalize, biased):
    logits, bias = make(3, 7, torch.float64, backend.device)
    args = (logits.requires_grad_(), bias if biased else None, 3)
    options = {"score": score, "renormalize": renormalize, "scale": 1.7}
    if biased:
        options |= {"num_groups": 7, "top_groups": 4}
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(backend.op(OP), args, options, test_utils=tests)
    torch.autograd.gradcheck(
        lambda z: backend.op(OP)(z, *args[1:], **options)[1],
        args[:1],
        fast_mode=backend.interpreted,
    )
    ids, weights = backend.op(OP)(*args, **options)
    assert not ids.requires_grad and weights.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_in_full(backend):
    """With a gradient opcheck adds up all outputs, which it cannot when the first holds integers;
    test_compiles compares those gradients."""
    logits, bias = make(3, 7, torch.float32, backend.device)
    torch.library.opcheck(backend.op(OP), (logits, bias, 3))
    ids, grad = backend.op(OP)(logits, None, 3)
    torch.library.opcheck(backend.op(BACKWARD), (grad, logits, ids))
    with pytest.raises(NotImplementedError, match="mergeme::topk_gating_backward: second deriv"):
        backend.op(BACKWARD)(grad, logits.requires_grad_(), ids).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens, num_experts, top_k", [(2, 65, 40), (1, 300, 3), (0, 4, 2)])
@pytest.mark.parametrize("score, renormalize, biased", MODES[::2], ids=MODE_IDS[::2])
def test_gradient_matches_autograd(backend, tokens, num_experts, top_k, score, renormalize, biased):
    logits, _ = make(tokens, num_experts, torch.float64, backend.device)
    if score == "none":
        logits = logits.abs()  # whose sums do not cancel
    logits.requires_grad_()
    ids, weights = backend.op(OP)(logits, None, top_k, score=score, renormalize=renormalize)
    factors = torch.randn_like(weights)
    (grad,) = torch.autograd.grad((weights * factors).sum(), logits)
    scores = {
        "softmax": lambda z: z.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
        "none": lambda z: z,
    }[score](logits)
    eager = scores.gather(1, ids.long())
    if renormalize:
        eager = eager / eager.sum(1, keepdim=True)
    (expected,) = torch.autograd.grad((eager * factors).sum(), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_gradients_of_extreme_logits(backend, score):
    """Where scores, or one minus them, underflow in float32; against float64."""
    logits = torch.tensor([[-150.0, -151.0, -200.0], [40.0, 150.0, 0.5]], device=backend.device)
    grad = torch.tensor([[1.0, -2.0], [0.5, 3.0]], device=backend.device)
    results = []
    for z in (logits, logits.double()):
        ids, weights = backend.op(OP)(z, None, 2, score=score)
        results.append(backend.op(BACKWARD)(grad.to(weights.dtype), z, ids, score=score))
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_of_a_softmax_gets_no_gradient(backend, dtype):
    logits, _ = make(4, 9, dtype, backend.device)
    _, weights = backend.op(OP)(logits.requires_grad_(), None, 1, scale=0.7)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert (weights == weights.new_tensor(0.7)).all() and grad.dtype == dtype and not grad.any()


BAD_INPUTS = [
    ({"logits": lambda t: t.int()}, TypeError, "expected logits to be float16.*got int32"),
    ({"logits": lambda t: t[0]}, ValueError, r"expected logits of shape \[T, E\], got \[7\]"),
    ({"bias": lambda t: t.double()}, TypeError, "expected bias to be float32, got float64"),
    ({"bias": lambda t: t[1:]}, ValueError, r"expected bias of shape \[7\], got \[6\]"),
    ({"top_k": lambda _: 0}, ValueError, r"expected top_k in \[1, E = 7\], got 0"),
    ({"top_k": lambda _: 8}, ValueError, r"expected top_k in \[1, E = 7\], got 8"),
    (
        {"score": lambda _: "relu"},
        ValueError,
        "expected score to be 'softmax', 'sigmoid', 'sqrtsoftplus' or 'none', got 'relu'",
    ),
    ({"num_groups": lambda _: 2}, ValueError, r"expected num_groups to divide E = 7 .*, got 2"),
    ({"num_groups": lambda _: 0}, ValueError, r"expected num_groups .* in \[1, 1024\], got 0"),
    (
        {
            "logits": lambda t: t[:, :1].expand(3, 2050),
            "bias": lambda _: None,
            "num_groups": lambda _: 1025,
        },
        ValueError,
        r"expected num_groups .* in \[1, 1024\], got 1025",
    ),
    (
        {"top_groups": lambda _: 2},
        ValueError,
        r"expected top_groups in \[1, num_groups = 1\], got 2",
    ),
    ({"top_groups": lambda _: 0}, ValueError, r"expected top_groups in .*, got 0"),
    (
        {"num_groups": lambda _: 7},
        ValueError,
        "expected top_k of at most 1, the experts of 1 groups, got 2",
    ),
    (
        {"group_score": lambda _: "mean"},
        ValueError,
        "expected group_score to be 'max' or 'top2', got 'mean'",
    ),
    (
        {"num_groups": lambda _: 7, "top_groups": lambda _: 2, "group_score": lambda _: "top2"},
        ValueError,
        "expected groups of at least 2 experts for group_score 'top2', got 1",
    ),
    (
        {"logits": lambda t: t[:, :1].expand(3, 2**31)},
        ValueError,
        r"expected fewer than 2\^31 - 1 experts .*, got 2147483648",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, spoil, error, message):
    logits, bias = make(3, 7, torch.float32, backend.device)
    args = {"logits": logits, "bias": bias, "top_k": 2, "score": "softmax"}
    args |= {"num_groups": 1, "top_groups": 1, "group_score": "max"}
    for name, change in spoil.items():
        args[name] = change(args[name])
    with pytest.raises(error, match=f"mergeme::{OP}: {message}"):
        backend.op(OP)(**args)


BAD_BACKWARD_INPUTS = [
    ("grad", lambda t: t.double(), TypeError, "expected grad to be float32, got float64"),
    ("grad", lambda t: t[:, 1:], ValueError, r"expected grad of shape \[3, 2\], got \[3, 1\]"),
    ("logits", lambda t: t.long(), TypeError, "expected logits to be float16.*got int64"),
    ("logits", lambda t: t[None], ValueError, r"expected logits of shape \[T, E\], got \[1, 3, 7"),
    ("topk_ids", lambda t: t.long(), TypeError, "expected topk_ids to be int32, got int64"),
    ("topk_ids", lambda t: t[0], ValueError, r"expected topk_ids of shape \[T, K\], got \[2\]"),
    ("topk_ids", lambda t: t[1:], ValueError, r"expected topk_ids of shape \[3, 2\], got \[2, 2\]"),
    ("score", lambda _: "relu", ValueError, "expected score to be 'softmax', 'sig"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, spoil, error, message", BAD_BACKWARD_INPUTS)
def test_backward_rejects_bad_input(backend, name, spoil, error, message):
    logits, _ = make(3, 7, torch.float32, backend.device)
    ids, grad = backend.op(OP)(logits, None, 2)
    args = {"grad": grad, "logits": logits, "topk_ids": ids, "score": "softmax"}
    args[name] = spoil(args[name])
    with pytest.raises(error, match=f"mergeme::{BACKWARD}: {message}"):
        backend.op(BACKWARD)(**args)


@pytest.mark.parametrize("backend, error", backends_with_errors(IndexError))
@pytest.mark.parametrize("bad", [-1, 7])
def test_backward_rejects_id_out_of_range(backend, error, bad):
    logits, _ = make(3, 7, torch.float32)
    ids, grad = backend.op(OP)(logits, None, 2)
    ids[2, 1] = bad
    message = rf"expected topk_ids in \[0, 7\), got {bad} at \[2, 1\]|device assert: ids\[k\] >= 0"
    with pytest.raises(error, match=message):
        backend.op(BACKWARD)(grad, logits, ids)


@pytest.mark.parametrize("backend", [CPU, SIMT])
@settings(max_examples=25, deadline=None)
@given(
    num_experts=st.integers(1, 80),
    part=st.floats(0, 1),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
)
def test_is_equivariant_and_normalised(backend, num_experts, part, mode, seed):
    """Renumbering the experts renumbers the choice; renormalised weights sum to one."""
    score, renormalize, biased = mode
    top_k = 1 + int(part * (num_experts - 1))
    logits, bias = make(2, num_experts, torch.float32, seed=seed)
    options = {"score": score, "renormalize": renormalize}
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    args = (bias if biased else None, top_k)
    ids, weights = backend.op(OP)(logits, *args, **options)
    args = (bias[order] if biased else None, top_k)
    renumbered, _ = backend.op(OP)(logits[:, order].contiguous(), *args, **options)
    if not biased or score != "softmax":  # a softmax's sum, and so its last bits, depend on order
        assert torch.equal(order[renumbered.long()], ids.long())
    if renormalize and score != "none":
        assert (weights.double().sum(1) - 1).abs().max() <= (top_k + 2) * 2.0**-24


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@settings(max_examples=6, deadline=None)
@given(
    num_experts=st.integers(1, 300),
    part=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_backends_give_the_same_bits(mode, num_experts, part, dtype, seed):
    score, renormalize, biased = mode
    top_k = 1 + int(part * (num_experts - 1))
    logits, bias = make(2, num_experts, dtype, seed=seed, spread=8.0)
    options = {"score": score, "renormalize": renormalize, "scale": 1.3}
    if num_experts % 4 == 0 and top_k <= num_experts // 2 and num_experts > 4:
        options |= {"num_groups": 4, "top_groups": 2, "group_score": "top2" if seed % 2 else "max"}
    args = (logits, bias if biased else None, top_k)
    cpu, simt = (b.op(OP)(*args, **options) for b in (CPU, SIMT))
    options = {name: options[name] for name in ("score", "renormalize", "scale")}
    grads = [b.op(BACKWARD)(cpu[1], logits, cpu[0], **options) for b in (CPU, SIMT)]
    assert torch.equal(cpu[0], simt[0]) and torch.equal(cpu[1], simt[1])
    assert torch.equal(*grads)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    for num_experts in (50, 1030):
        logits, bias = make(5, num_experts, torch.float32)
        expected = CPU.op(OP)(logits, bias, 3, renormalize=False)
        grad = CPU.op(BACKWARD)(expected[1], logits, expected[0], renormalize=False)
        with schedule:
            ids, weights = SIMT.op(OP)(logits, bias, 3, renormalize=False)
            assert torch.equal(ids, expected[0]) and torch.equal(weights, expected[1])
            assert torch.equal(SIMT.op(BACKWARD)(weights, logits, ids, renormalize=False), grad)


def test_thread_count_changes_no_bit():
    logits, bias = make(3001, 24, torch.bfloat16)
    expected = CPU.op(OP)(logits, bias, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out = CPU.op(OP)(logits, bias, 4)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


def digest():
    """Every bit of the CPU's results over dtypes and modes, as one line."""
    digests = []
    for dtype, (score, renormalize, biased) in itertools.product(DTYPES, MODES):
        logits, bias = make(40, 77, dtype, spread=8.0)
        options = {"score": score, "renormalize": renormalize}
        ids, weights = CPU.op(OP)(logits, bias if biased else None, 9, **options)
        grad = CPU.op(BACKWARD)(weights, logits, ids, **options)
        digests += [zlib.crc32(t.view(torch.uint8).numpy()) for t in (ids, weights, grad)]
    return str(digests)


@pytest.mark.slow
def test_instruction_set_changes_no_bit():
    code = f"from {__name__} import digest; print(digest())"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "MERGEME_CPU_ISA": isa},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in ("portable", "avx2")
    ]
    outputs = [run.communicate()[0].strip() for run in runs]
    assert outputs == [digest(), digest()]  # ours with whatever this process runs


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend):
    logits, bias = make(6, 9, torch.float32, backend.device)

    def gate(logits):
        return backend.op(OP)(logits, bias, 3, score="sigmoid", scale=2.0)

    results = []
    for function in (gate, torch.compile(gate, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        ids, weights = function(leaf)
        results.append((ids, weights, *torch.autograd.grad(weights, leaf, weights.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_experts", [8, 64, 256, 1000, 5000])
def test_gpu_gives_the_cpu_s_bits_on_a_side_stream(num_experts):
    logits, bias = make(1001, num_experts, torch.float32, "cuda")
    expected = CPU.op(OP)(logits.cpu(), bias.cpu(), 8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = CUDA.op(OP)(logits, bias, 8)
    stream.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_31_logits():
    logits = torch.zeros(2**28 + 1, 8, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 1
    ids, _ = CUDA.op(OP)(logits, None, 1)
    assert ids[-1].item() == 5 and ids.sum().item() == 5
