import pytest
import torch

from mergeme_ext.moe import load_balancing_loss, pooled_load_balancing_loss, router_z_loss
from mergeme_ext.ops import topk_gating
from python_tests.support.tolerance import assert_as_good_as_eager

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make(layers=3, tokens=24, num_experts=9, top_k=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(tokens, num_experts, generator=g) for _ in range(layers)]
    logits = [z.to(dtype) for z in logits]
    ids = [topk_gating(z, None, top_k)[0] for z in logits]
    mask = torch.rand(4, tokens // 4, generator=g) < 0.6
    return logits, ids, mask


def balance(logits, ids, mask):
    """float64 loops over the concatenated layers."""
    num_experts = logits[0].shape[1]
    load, probability, tokens = [0.0] * num_experts, [0.0] * num_experts, 0
    kept = [True] * len(logits[0]) if mask is None else mask.flatten().tolist()
    for layer, chosen in zip(logits, ids, strict=True):
        for row, experts, keep in zip(layer.double(), chosen.tolist(), kept, strict=True):
            if not keep:
                continue
            tokens += 1
            for e in experts:
                load[e] += 1
            for e, p in enumerate(row.softmax(0).tolist()):
                probability[e] += p
    pairs = zip(load, probability, strict=True)
    return num_experts * sum(f / tokens * p / tokens for f, p in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_balance_is_the_formula(dtype, masked):
    logits, ids, mask = make(dtype=dtype)
    mask = mask if masked else None
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    pooled = pooled_load_balancing_loss(logits, ids, mask=mask)
    assert pooled.item() == pytest.approx(balance(logits, ids, mask), rel=exact)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for z, i in zip(logits, ids, strict=True):
        alone = load_balancing_loss(z, i, mask=mask)
        assert alone.item() == pytest.approx(balance([z], [i], mask), rel=exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_pooled_is_transformers_loss(dtype, masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, ids, mask = make(dtype=dtype)
    mask = mask.long() if masked else None
    ours, theirs = ([z.clone().requires_grad_() for z in logits] for _ in range(2))
    loss = pooled_load_balancing_loss(ours, ids, mask=mask)
    expected = mixtral.load_balancing_loss_func(tuple(theirs), 9, 3, mask)
    # Theirs rounds probabilities to the logits' type, and in float64 to float32.
    rounding = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).eps
    assert loss.item() == pytest.approx(expected.item(), rel=8 * rounding)
    loss.backward()
    expected.backward()
    exact = [z.double().requires_grad_() for z in logits]
    pooled_load_balancing_loss(exact, ids, mask=mask).backward()
    for a, b, z in zip(ours, theirs, exact, strict=True):
        assert_as_good_as_eager(a.grad, z.grad, b.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_is_the_formula(dtype, masked):
    (logits,), _, mask = make(layers=1, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    loss = router_z_loss(leaf, mask=mask if masked else None)
    exact = logits.double().requires_grad_()
    rows = exact[mask.flatten()] if masked else exact
    expected = rows.logsumexp(1).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, leaf)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    assert (grad.double() - expected_grad).norm() <= rounding * expected_grad.norm()


def test_gradients_are_the_derivatives():
    logits, ids, mask = make(layers=2, tokens=8, num_experts=5, dtype=torch.float64)
    leaves = [z.requires_grad_() for z in logits]
    torch.autograd.gradcheck(
        lambda *z: pooled_load_balancing_loss(z, ids, mask=mask) + router_z_loss(z[0]), leaves
    )


def test_balance_of_perfect_balance_is_k():
    logits = torch.zeros(12, 6)
    ids = torch.arange(24, dtype=torch.int32).view(12, 2) % 6
    assert load_balancing_loss(logits, ids).item() == pytest.approx(2)


def test_uneven_layers_may_balance_each_other():
    """The difference between the pooled form and the mean of layers."""
    logits = [10 * torch.eye(2)[[0, 0, 0]], 10 * torch.eye(2)[[1, 1, 1]]]
    ids = [torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1, dtype=torch.int32)]
    assert pooled_load_balancing_loss(logits, ids).item() == pytest.approx(1)
    for z, i in zip(logits, ids, strict=True):
        assert load_balancing_loss(z, i).item() == pytest.approx(2, rel=1e-3)


def test_no_token_has_no_loss():
    logits, ids, mask = make(layers=1)
    empty = torch.zeros_like(mask)
    leaf = logits[0].requires_grad_()
    loss = load_balancing_loss(leaf, ids[0], mask=empty) + router_z_loss(leaf, mask=empty)
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()
    assert load_balancing_loss(leaf[:0], ids[0][:0]).item() == 0
    assert router_z_loss(leaf[:0]).item() == 0


def test_masked_tokens_do_not_matter():
    logits, ids, mask = make(layers=1)
    hidden = ~mask.flatten()
    spoiled = logits[0].masked_fill(hidden[:, None], torch.nan)
    for z in (spoiled.requires_grad_(), logits[0].requires_grad_()):
        (load_balancing_loss(z, ids[0], mask=mask) + router_z_loss(z, mask=mask)).backward()
    assert torch.equal(spoiled.grad, logits[0].grad) and not spoiled.grad[hidden].any()


def test_rejects_bad_input():
    logits, ids, mask = make(layers=2)
    with pytest.raises(ValueError, match=r"mask to have one element for each of the 24 rows.*\[3"):
        load_balancing_loss(logits[0], ids[0], mask=mask[:3])
    with pytest.raises(ValueError, match="one tensor for each layer, got 2 and 1"):
        pooled_load_balancing_loss(logits, ids[:1])
    with pytest.raises(ValueError, match="one tensor for each layer, got 0 and 0"):
        pooled_load_balancing_loss([], [])
    with pytest.raises(ValueError, match="expected logits of shape"):
        router_z_loss(logits[0][0])


@pytest.mark.slow
def test_compiles():
    logits, ids, mask = make()

    def losses(logits):
        return pooled_load_balancing_loss(logits, ids, mask=mask) + router_z_loss(logits[0])

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True)):
        leaves = [z.clone().requires_grad_() for z in logits]
        results.append(torch.autograd.grad(function(leaves), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
