import pytest
import torch

from mergeme_ext.moe import MoELayer, TopKRouter
from mergeme_ext.ops import topk_gating
from python_tests.references.topk_gating import (
    gate_weights,
    group_scores,
    open_experts,
    scores,
    select,
)

OPTIONS = {
    "mixtral": {},
    "olmoe": {"renormalize": False},
    "deepseek v2": {
        "renormalize": False,
        "scale": 16.0,
        "num_groups": 4,
        "top_groups": 2,
        "compute_dtype": torch.float32,
    },
    "deepseek v3": {
        "score": "sigmoid",
        "scale": 2.5,
        "num_groups": 4,
        "top_groups": 2,
        "group_score": "top2",
        "selection_bias": True,
    },
    "sqrtsoftplus": {"score": "sqrtsoftplus", "selection_bias": True},
    "none": {"score": "none", "renormalize": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_choice(name):
    options = OPTIONS[name]
    router = TopKRouter(16, 12, 3, **options)
    torch.nn.init.normal_(router.weight)
    if router.selection_bias is not None:
        torch.nn.init.normal_(router.selection_bias)
    logits, ids, weights = router(torch.randn(40, 16))

    score = options.get("score", "softmax")
    keys = scores(logits, score)
    if router.selection_bias is not None:
        keys = keys + router.selection_bias.double()
    if "num_groups" in options:
        groups = group_scores(keys, 4, options.get("group_score", "max"))
        mask = open_experts(select(groups, 2), 4, 12)
        keys = keys.masked_fill(~mask, -torch.inf)
    assert torch.equal(ids, select(keys, 3))
    expected = gate_weights(
        logits, ids, score, options.get("renormalize", True), options.get("scale", 1.0)
    )
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_wider_dtype_for_the_logits(dtype):
    router = TopKRouter(64, 8, 2, compute_dtype=torch.float32, dtype=dtype)
    x = torch.randn(20, 64).to(dtype)
    logits, _, weights = router(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert logits.dtype == weights.dtype == wide
    assert torch.equal(logits, torch.nn.functional.linear(x.to(wide), router.weight.to(wide)))
    logits.sum().backward()
    assert router.weight.grad.dtype == dtype


def test_jitter_is_for_training_only():
    router = TopKRouter(64, 8, 2, jitter=0.1)
    x = torch.randn(200, 64)
    exact = router.eval()(x)[0]
    assert torch.equal(exact, x @ router.weight.T)
    router.train()
    torch.manual_seed(1)
    first = router(x)[0]
    torch.manual_seed(1)
    assert torch.equal(router(x)[0], first) and not torch.equal(first, exact)
    # Each term of a logit moves by at most a tenth.
    assert ((first - exact).abs() <= 0.1001 * (x.abs() @ router.weight.abs().T)).all()


def test_update_of_the_selection_bias():
    router = TopKRouter(4, 4, 1, selection_bias=True)
    with torch.no_grad():
        router.weight.copy_(10 * torch.eye(4))
    x = torch.eye(4)[[0, 0, 0, 0, 1, 2, 2, 1]]  # 4, 2, 2 and 0 tokens; 2 on average
    router(x[:3])
    router(x[3:])
    assert router.expert_counts.tolist() == [4, 2, 2, 0]
    router.update_selection_bias(rate=0.25)
    assert router.selection_bias.tolist() == [-0.25, 0, 0, 0.25]
    assert not router.expert_counts.any()
    router.eval()(x)
    assert not router.expert_counts.any()
    router.update_selection_bias()
    assert router.selection_bias.tolist() == [-0.25, 0, 0, 0.25]


def test_balancing_by_the_selection_bias_balances():
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2, score="sigmoid", selection_bias=True)
    torch.nn.init.normal_(router.weight, std=0.5)
    x = torch.randn(512, 16) + 1  # a mean of its own favours some experts

    def largest_share():
        ids = router.eval()(x)[1]
        router.train()
        return torch.bincount(ids.flatten(), minlength=8).max().item() / ids.numel()

    before = largest_share()
    for _ in range(300):
        router(x)
        router.update_selection_bias(0.01)
    assert before > 0.2 and largest_share() < 0.14  # 1 / 8 would be even


def test_the_bias_takes_no_part_in_the_weights():
    router = TopKRouter(8, 4, 2, score="sigmoid", renormalize=False, selection_bias=True)
    router.selection_bias.copy_(torch.tensor([0.0, 100.0, 0.0, 100.0]))
    logits, ids, weights = router(torch.randn(5, 8))
    assert (ids.sort().values == torch.tensor([1, 3])).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, ids.long()))


def test_a_cast_leaves_the_bias_in_float32():
    layer = MoELayer(8, 4, 4, selection_bias=True)
    layer.router.selection_bias.fill_(0.1)
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert torch.equal(layer.router.selection_bias, torch.full((4,), 0.1))
    other = MoELayer(8, 4, 4, selection_bias=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.router.selection_bias, layer.router.selection_bias)
    assert "router.expert_counts" not in layer.state_dict()


def test_the_gradient_is_that_of_the_op():
    router = TopKRouter(6, 5, 2, score="sigmoid", dtype=torch.float64)
    x = torch.randn(7, 6, dtype=torch.float64)
    weight = router.weight.detach() * 30

    def run(x, weight):
        return torch.func.functional_call(router, {"weight": weight}, (x,))[2]

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight.requires_grad_()))
    weights = topk_gating(x @ weight.T, None, 2, score="sigmoid")[1]
    assert torch.equal(run(x, weight), weights)


BAD = [
    ({"score": "relu"}, "score to be one of .* got 'relu'"),
    ({"group_score": "mean"}, "group_score to be one of .* got 'mean'"),
    ({"num_groups": 3}, "num_groups to divide num_experts = 8, got 3"),
    ({"num_groups": 0}, "num_groups to divide num_experts = 8, got 0"),
    ({"num_groups": 4, "top_groups": 5}, r"top_groups in \[1, num_groups = 4\].*got 5"),
    ({"num_groups": 8, "top_groups": 2}, "at least top_k = 3, got 2"),
    ({"jitter": 1.0}, r"jitter in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_rejects_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(8, 8, 3, **options)
    with pytest.raises(ValueError, match=message):
        MoELayer(8, 4, 8, 3, **options)


def test_rejects_an_update_without_a_bias():
    with pytest.raises(ValueError, match="selection_bias=True"):
        TopKRouter(8, 4, 2).update_selection_bias()
