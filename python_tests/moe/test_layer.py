import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from mergeme_ext.moe import Experts, MoELayer, TopKRouter
from mergeme_ext.moe.losses import load_balancing_loss, router_z_loss
from python_tests.references.moe_layer import moe_layer as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (leading shape, H, I, E, K): no token, one token, odd sizes, one expert, all experts.
CASES = [((0,), 8, 4, 3, 2), ((1,), 8, 4, 4, 1), ((2, 0, 3), 8, 4, 2, 2)]
CASES += [((3, 7), 33, 17, 5, 2), ((40,), 24, 40, 4, 4), ((5,), 16, 8, 1, 1)]


def stock_block(hidden, intermediate, num_experts, top_k, dtype, seed=0):
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return block.to(dtype)


def tokens(shape, hidden, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, hidden, generator=g, dtype=torch.float64).to(dtype)


def error(actual, expected):
    """Largest error, as a share of the largest value."""
    if not actual.numel():
        return 0.0
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, hidden, intermediate, num_experts, top_k", CASES)
def test_matches_reference_and_stock(shape, hidden, intermediate, num_experts, top_k, dtype):
    block = stock_block(hidden, intermediate, num_experts, top_k, dtype)
    x = tokens(shape, hidden, dtype)
    layer = MoELayer.from_mixtral(block)
    with torch.no_grad():
        out, logits = layer(x, return_router_logits=True)
        stock = block(x.view(1, -1, hidden)).view_as(x) if x.numel() else x
    assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous()
    assert logits.shape == (*shape, num_experts) and logits.dtype == dtype
    experts = block.experts
    flat = (x.view(-1, hidden), logits.view(-1, num_experts))
    expected = reference(*flat, experts.gate_up_proj, experts.down_proj, top_k).view(out.shape)
    # A fused chain: at most twice the error of the same steps in eager torch, and one unit.
    unit = torch.finfo(dtype).eps
    assert error(out, expected) <= 2 * error(stock, expected) + unit
    # gamma_H for the dot products, one rounding at the store.
    exact = x.double() @ block.gate.weight.double().T
    terms = x.double().abs() @ block.gate.weight.double().abs().T
    acc = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    assert (
        (logits.double() - exact).abs() <= unit / 2 * exact.abs() + 2 * hidden * acc * terms
    ).all()


def test_gradients_in_float64():
    layer = MoELayer(6, 4, 3, top_k=2, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.mul_(30)
        layer.experts.gate_up_proj.mul_(30)
        layer.experts.down_proj.mul_(30)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        swapped = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, swapped, (x,))

    x = tokens((5,), 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values))


def test_gradients_match_stock():
    block = stock_block(16, 8, 4, 2, torch.float32)
    x = tokens((11,), 16, torch.float32)

    def gradients(module, x):
        leaf = x.clone().requires_grad_()
        weight = torch.linspace(-1, 1, 16)
        (module(leaf) * weight).sum().backward()
        found = {n: p.grad for n, p in block.named_parameters()} | {"x": leaf.grad}
        block.zero_grad()
        return found

    ours = gradients(MoELayer.from_mixtral(block), x)
    stock = gradients(block, x.view(1, -1, 16))
    for name, grad in ours.items():
        # Two float32 roads to sums of at most T * I * K terms.
        bound = 11 * 8 * 2 * torch.finfo(torch.float32).eps
        assert error(grad.view(-1), stock[name].double().view(-1)) <= bound, name


def test_no_tokens_has_zero_gradients():
    layer = MoELayer(8, 4, 3)
    layer(torch.empty(0, 8)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@settings(max_examples=25)
@given(num_experts=st.integers(1, 6), tokens_=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_permuting_experts_changes_little(num_experts, tokens_, seed):
    top_k = 1 + seed % num_experts
    layer = MoELayer(8, 5, num_experts, top_k, dtype=torch.float64)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    other = MoELayer(8, 5, num_experts, top_k, dtype=torch.float64)
    other.load_state_dict({name: p[order] for name, p in layer.state_dict().items()})
    x = tokens((tokens_,), 8, torch.float64, seed)
    expected = layer(x)
    assert error(other(x), expected) <= 64 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_experts_are_the_dense_mlp(dtype):
    layer = MoELayer(16, 12, 4, 3, dtype=dtype)
    with torch.no_grad():
        layer.router.weight.mul_(50)
        for p in layer.experts.parameters():
            p.copy_(p[:1].mul(40).expand_as(p).clone())
    x = tokens((9,), 16, dtype)
    gate_up, down = layer.experts.gate_up_proj[0].double(), layer.experts.down_proj[0].double()
    g, u = (x.double() @ gate_up.T).chunk(2, -1)
    expected = (torch.nn.functional.silu(g) * u) @ down.T
    # The reference rounds too: sums of H and I terms, whose sizes add up to this.
    g, u = (x.double().abs() @ gate_up.abs().T).chunk(2, -1)
    terms = ((g * u) @ down.abs().T).max() / expected.abs().max()
    own = (16 + 12) * torch.finfo(torch.float64).eps * terms
    with torch.no_grad():
        g, u = (x @ layer.experts.gate_up_proj[0].T).chunk(2, -1)
        eager = (torch.nn.functional.silu(g) * u) @ layer.experts.down_proj[0].T
        bound = 2 * error(eager, expected) + torch.finfo(dtype).eps + own
        assert error(layer(x), expected) <= bound


def test_router_options():
    router = TopKRouter(8, 4, 2, score="sigmoid", renormalize=False, scale=2.5, selection_bias=True)
    x = tokens((6,), 8, torch.float32)
    router.selection_bias[3] = 10.0
    logits, ids, weights = router(x)
    assert (ids[:, 0] == 3).all()
    torch.testing.assert_close(weights, 2.5 * logits.sigmoid().gather(1, ids.long()))
    # A cast of the whole module takes the bias along; the router still runs.
    assert router.bfloat16()(x.bfloat16())[1].dtype == torch.int32


def test_from_mixtral_shares_parameters():
    block = stock_block(8, 4, 3, 2, torch.float32)
    layer = MoELayer.from_mixtral(block.eval())
    assert layer.router.weight is block.gate.weight and not layer.training
    assert layer.experts.gate_up_proj is block.experts.gate_up_proj
    assert layer.experts.down_proj is block.experts.down_proj
    assert (layer.router.top_k, len(list(layer.parameters()))) == (2, 3)


BAD_INPUTS = [
    (lambda: MoELayer(8, 4, 2, 3), ValueError, r"top_k in \[1, num_experts = 2\], got 3"),
    (lambda: MoELayer(8, 4, 2, 0), ValueError, "top_k in .* got 0"),
    (lambda: MoELayer(8, 0, 2), ValueError, "to be positive, got 8, 0 and 2"),
    (lambda: TopKRouter(8, 0, 1), ValueError, "to be positive, got 8 and 0"),
    (lambda: Experts(0, 4, 2), ValueError, "to be positive, got 0, 4 and 2"),
    (lambda: MoELayer(8, 4, 2, score="relu"), ValueError, "score to be one of .* got 'relu'"),
    (lambda: MoELayer(8, 4, 2, activation="relu"), ValueError, "activation to be one .* 'relu'"),
    (lambda: MoELayer(8, 4, 2, capacity_factor=0), ValueError, "capacity_factor to be .* got 0"),
    (lambda: MoELayer(8, 4, 2, drop_policy="x"), ValueError, "drop_policy to be one of .* 'x'"),
    (lambda: MoELayer(8, 4, 2, shared_gate=True), ValueError, "expected shared_intermediate_size"),
    (lambda: MoELayer(8, 4, 2, shared_intermediate_size=0), ValueError, "positive, got 0"),
    (lambda: MoELayer(8, 4, 2, renormalise=True), TypeError, "renormalise"),
    (lambda: MoELayer.from_mixtral(torch.nn.Linear(2, 2)), TypeError, "MixtralSparseMoeBlock"),
]


@pytest.mark.parametrize("call, kind, message", BAD_INPUTS)
def test_rejects_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def every_option(activation, dtype=torch.float64):
    layer = MoELayer(
        12,
        7,
        6,
        top_k=3,
        activation=activation,
        shared_intermediate_size=5,
        shared_gate=True,
        score="sigmoid",
        renormalize=False,
        scale=1.5,
        num_groups=3,
        top_groups=2,
        group_score="top2",
        selection_bias=True,
        dtype=dtype,
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(20)
        layer.router.selection_bias.normal_()
    return layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_options_at_once(activation):
    layer, f = every_option(activation), ACTIVATIONS[activation]
    x = tokens((9,), 12, torch.float64)
    with torch.no_grad():
        out = layer(x)
        _, ids, weights = layer.router(x)
        expected = torch.zeros_like(x)
        for t, k in [(t, k) for t in range(9) for k in range(3)]:
            e = ids[t, k]
            gate, up = (layer.experts.gate_up_proj[e] @ x[t]).chunk(2)
            expected[t] += weights[t, k] * (layer.experts.down_proj[e] @ (f(gate) * up))
        shared = layer.shared_expert
        inner = f(x @ shared.gate_proj.weight.T) * (x @ shared.up_proj.weight.T)
        share = (x @ layer.shared_expert_gate.weight.T).sigmoid()
        expected += share * (inner @ shared.down_proj.weight.T)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


def test_gradients_of_all_options():
    layer = every_option("gelu").eval()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        swapped = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, swapped, (x,))

    x = tokens((4,), 12, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("policy", ["order", "weight", "token"])
@pytest.mark.parametrize("factor", [0.25, 0.7, 1.0, 100.0])
def test_capacity_drops_the_right_choices(factor, policy):
    layer = MoELayer(12, 7, 4, top_k=2, capacity_factor=factor, drop_policy=policy)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(20)
    x = tokens((13,), 12, torch.float32) + 0.5
    _, ids, weights = layer.router(x)
    capacity = -(-factor * 26 // 4)
    key = {"order": torch.zeros(13, 2), "weight": weights, "token": weights.amax(1, True)}[policy]
    key = key.expand(13, 2).detach().flatten().tolist()
    kept = torch.zeros(26)
    for e in range(4):
        slots = (ids.flatten() == e).nonzero().flatten().tolist()
        kept[sorted(slots, key=lambda s: (-key[s], s))[: int(capacity)]] = 1
    assert factor == 100 or kept.sum() < 26
    # A dropped choice has the weight 0; the weights of a token's other choices stay.
    expected = layer.experts(x, ids, weights * kept.view(13, 2))
    assert torch.equal(layer(x), expected)
    out_grad = tokens((13,), 12, torch.float32, seed=3)
    a = torch.autograd.grad(layer(x), list(layer.parameters()), out_grad)
    b = torch.autograd.grad(expected, list(layer.parameters()), out_grad)
    for found, wanted in zip(a, b, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_routing_is_the_routers():
    layer = MoELayer(12, 7, 4, compute_dtype=torch.float32, dtype=torch.bfloat16)
    x = tokens((2, 5), 12, torch.bfloat16)
    out, routing = layer(x, return_routing=True)
    expected = layer.router(x.view(10, 12))
    assert all(torch.equal(a, b) for a, b in zip(routing, expected, strict=True))
    assert torch.equal(out, layer(x)) and routing.logits.dtype == torch.float32
    assert torch.equal(layer(x, return_router_logits=True)[1].view(10, 4), routing.logits)


def test_the_losses_take_the_routing():
    layer = MoELayer(12, 7, 4, top_k=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1] = 1  # all tokens of ones prefer expert 1
    x = torch.ones(6, 12)
    routing = layer(x, return_routing=True)[1]
    p = torch.softmax(torch.tensor([0.0, 12.0, 0.0, 0.0]), 0)[1]
    loss = load_balancing_loss(routing.logits, routing.topk_ids)
    torch.testing.assert_close(loss, 4 * p)
    before = loss.item()
    loss.backward()
    with torch.no_grad():
        layer.router.weight -= layer.router.weight.grad * 1e5
    routing = layer(x, return_routing=True)[1]
    assert load_balancing_loss(routing.logits, routing.topk_ids) < before
    assert router_z_loss(routing.logits).requires_grad


def test_a_sentinel_is_no_expert():
    experts = Experts(8, 4, 3)
    x = tokens((5,), 8, torch.float32)
    ids = torch.tensor([[0, 3], [3, 3], [2, 1], [3, 0], [1, 2]], dtype=torch.int32)
    weights = torch.rand(5, 2)
    out = experts(x, ids, weights, sentinel=True)
    assert not out[1].any() and out[0].any()
    assert torch.equal(out, experts(x, ids % 3, weights * (ids < 3)))
    with pytest.raises(IndexError, match="got 3"):
        experts(x, ids, weights)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_compile_matches_eager(train):
    layer = MoELayer(16, 8, 4)
    x = tokens((2, 7), 16, torch.float32).requires_grad_(train)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    if train:
        expected = torch.autograd.grad(layer(x).square().sum(), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected)


@pytest.mark.slow
def test_compile_with_every_option():
    layer = MoELayer(
        16,
        8,
        4,
        capacity_factor=0.8,
        drop_policy="weight",
        shared_intermediate_size=8,
        shared_gate=True,
        selection_bias=True,
        compute_dtype=torch.float32,
        dtype=torch.bfloat16,
    )
    x = tokens((2, 7), 16, torch.bfloat16)
    expected, counts = layer(x), layer.router.expert_counts.clone()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(layer.router.expert_counts, 2 * counts) and counts.sum() == 28
