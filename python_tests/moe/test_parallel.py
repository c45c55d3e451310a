"""Experts over two and three processes, against one process on all tokens."""

import re

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mergeme_ext.moe import (
    Experts,
    MoELayer,
    ParallelExperts,
    full_state_dict,
    parallel_parameter_names,
    per_expert_state_dict,
)
from mergeme_ext.moe.packed import packed_copies
from mergeme_ext.moe.parallel import split_experts
from python_tests.support.ranks import Failure, Ranks

H, INNER = 24, 20
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    pools = {}

    def start(world_size):
        pools[world_size] = Ranks(world_size, tmp_path_factory.mktemp("ranks"))
        return pools[world_size]

    yield lambda n: pools[n] if n in pools else start(n)
    for pool in pools.values():
        pool.close()


@pytest.fixture(params=[2, 3], ids=["two", "three"])
def ranks(request, pools):
    return pools(request.param)


def weights_of(num_experts, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate_up_proj": (num_experts, 2 * INNER, H), "down_proj": (num_experts, H, INNER)}
    return {
        name: (torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)
        for name, shape in shapes.items()
    }


def tokens_of(num_tokens, num_experts, top_k, dtype, seed, allowed=None):
    """x, topk_ids, topk_weights and the gradient that comes back, of one rank."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, H, generator=g, dtype=torch.float64).to(dtype)
    allowed = list(range(num_experts)) if allowed is None else allowed
    picks = [torch.randperm(len(allowed), generator=g)[:top_k] for _ in range(num_tokens)]
    ids = torch.tensor(allowed, dtype=torch.int32)[torch.stack(picks)] if picks else None
    ids = torch.empty(0, top_k, dtype=torch.int32) if ids is None else ids
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(num_tokens, top_k, generator=g, dtype=torch.float64).to(acc)
    grad = torch.randn(num_tokens, H, generator=g, dtype=torch.float64).to(dtype)
    return x, ids, weights, grad


def run(function, x, ids, weights, grad, experts=None):
    """Output and gradients of x, topk_weights, gate_up_proj and down_proj."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = function(x, ids, weights)
    experts = experts or function
    inputs = [x, weights, experts.gate_up_proj, experts.down_proj]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def run_on_rank(state, counts, num_experts, *arguments):
    dtype = arguments[0].dtype
    experts = ParallelExperts(H, INNER, num_experts, experts_per_rank=counts, dtype=dtype)
    experts.load_state_dict(state)
    return run(experts, *arguments)


# Name: experts, top-k, tokens of each rank (the first two or three), experts of each rank or None
# for an even split, experts that are chosen from or None for all.
CASES = {
    "even": (6, 2, [7, 7, 7], None, None),
    "uneven tokens": (6, 3, [1, 13, 40], None, None),
    "uneven experts": (7, 2, [9, 4, 6], None, None),
    "experts as told": (6, 2, [9, 4, 6], {2: [5, 1], 3: [1, 4, 1]}, None),
    "a rank without tokens": (5, 2, [11, 0, 6], None, None),
    "no tokens at all": (5, 2, [0, 0, 0], None, None),
    "experts without tokens": (8, 2, [9, 5, 7], None, [1, 6]),
    "a rank whose experts have no tokens": (6, 2, [9, 5, 7], None, [3, 4, 5]),
    "all experts": (3, 3, [5, 6, 7], None, None),
    "one choice": (4, 1, [30, 2, 8], None, None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_one_process(ranks, case, dtype):
    num_experts, top_k, num_tokens, counts, allowed = CASES[case]
    num_tokens, counts = num_tokens[: ranks.world_size], (counts or {}).get(ranks.world_size)
    state = weights_of(num_experts, dtype)
    batches = [
        tokens_of(t, num_experts, top_k, dtype, seed=r, allowed=allowed)
        for r, t in enumerate(num_tokens)
    ]
    results = ranks.run(run_on_rank, [(state, counts, num_experts, *b) for b in batches])
    got = [torch.cat(parts) for parts in zip(*results, strict=True)]

    whole = Experts(H, INNER, num_experts, dtype=dtype)
    whole.load_state_dict(state)
    joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    expected = run(whole, *joined)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    out, grad_x, *rest = (pair for pair in zip(got, expected, strict=True))
    # An expert's rows, and so all sums over them, are those of one process, in the same order.
    assert all(torch.equal(a, b) for a, b in rest)
    # Only the K rows of a token may have been rounded on their way, and then at each of K sums.
    x, ids, weights, grad = joined
    by_k = [run(whole, x, ids[:, [k]], weights[:, [k]], grad)[:2] for k in range(top_k)]
    for (a, b), terms in zip((out, grad_x), zip(*by_k, strict=True), strict=True):
        magnitude = torch.stack(terms).double().abs().sum(0)
        unit = torch.finfo(dtype).eps / 2
        acc = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        bound = unit * (magnitude + a.double().abs() + b.double().abs())
        bound += 2 * (top_k + 1) * acc * magnitude
        assert ((a.double() - b.double()).abs() <= bound * (1 + 4 * unit) + 1e-300).all()


def test_float_gradients_are_those_of_one_process(ranks):
    batches = [tokens_of(9 + r, 5, 3, torch.float32, seed=r) for r in range(ranks.world_size)]
    state = weights_of(5, torch.float32)
    results = ranks.run(run_on_rank, [(state, None, 5, *b) for b in batches])
    whole = Experts(H, INNER, 5)
    whole.load_state_dict(state)
    expected = run(whole, *[torch.cat(parts) for parts in zip(*batches, strict=True)])
    for got, want in list(zip(zip(*results, strict=True), expected, strict=True))[1:]:
        assert torch.equal(torch.cat(got), want)


def run_limited_on_rank(state, x, ids, weights, grad, limits):
    experts = ParallelExperts(H, INNER, 5, activation="gelu_tanh")
    experts.load_state_dict(state)
    return run(lambda *inputs: experts(*inputs, **limits), x, ids, weights, grad, experts)


LIMITS = [{"sentinel": True}, {"sentinel": True, "capacity": 2}, {"sentinel": True, "capacity": 0}]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("by_weight", [False, True])
def test_dropped_choices_do_not_travel_and_add_nothing(ranks, limits, by_weight):
    state = weights_of(5, torch.float32)
    arguments, expected = [], []
    whole = Experts(H, INNER, 5, activation="gelu_tanh")
    whole.load_state_dict(state)
    for r, num_tokens in enumerate([8, 1, 13][: ranks.world_size]):
        x, ids, weights, grad = tokens_of(num_tokens, 6, 3, torch.float32, seed=r)  # 5: no expert
        options = dict(limits)
        if by_weight and "capacity" in limits:
            options["priority"] = weights
        arguments.append((state, x, ids, weights, grad, options))
        expected.append(run(lambda *a, o=options: whole(*a, **o), x, ids, weights, grad, whole))
    results = ranks.run(run_limited_on_rank, arguments)
    for got, want in zip(results, expected, strict=True):
        for a, b in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert sum(got[0].abs().sum() for got in results) > 0 or limits.get("capacity") == 0
    for name in (3, 4):  # the experts' gradients: a sum over the ranks
        got = torch.cat([result[name] for result in results])
        torch.testing.assert_close(got, sum(w[name] for w in expected), rtol=1e-4, atol=1e-4)


def infer_on_rank(state, x, ids, weights):
    experts = ParallelExperts(H, INNER, 5, dtype=x.dtype).eval()
    experts.load_state_dict(state)
    with torch.no_grad():
        found = [experts(x, ids, weights) for _ in range(2)]
    return *found, len(packed_copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_with_packed_copies(ranks, dtype):
    state = weights_of(5, dtype)
    batches = [tokens_of(t, 5, 2, dtype, seed=t) for t in (9, 0, 4)[: ranks.world_size]]
    trained = ranks.run(run_on_rank, [(state, None, 5, *b) for b in batches])
    results = ranks.run(infer_on_rank, [(state, *b[:3]) for b in batches])
    for (first, again, copies), (expected, *_) in zip(results, trained, strict=True):
        assert torch.equal(first, expected) and torch.equal(again, expected)
        assert copies == 2


def layers_on_rank(x, seed):
    """Two layers, one after the other, trained one step; and the one-process twin's figures."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(MoELayer(H, INNER, 5, top_k=2), MoELayer(H, INNER, 5, top_k=3))
    twins = torch.nn.Sequential(MoELayer(H, INNER, 5, top_k=2), MoELayer(H, INNER, 5, top_k=3))
    twins.load_state_dict(layers.state_dict())
    for layer in twins:
        layer.divide_experts()
    found = []
    for module in (layers, twins):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        found.append((out.detach(), leaf.grad, module[0].router.weight.grad))
    return found


def test_a_model_of_two_layers(ranks):
    x = [torch.randn(t, H, generator=torch.Generator().manual_seed(t)) for t in (6, 0, 11)]
    results = ranks.run(layers_on_rank, [(x[r], 3) for r in range(ranks.world_size)])
    for alone, parallel in results:
        for a, b in zip(alone, parallel, strict=True):
            scale = a.abs().max().item() if a.numel() else 0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


def train_on_rank(state, x):
    """One step's gradients under DistributedDataParallel."""
    model = two_parts()
    model.load_state_dict(state)
    model[1].divide_experts()
    names = parallel_parameter_names(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)  # by name: it must outlive backward
    wrapped(x).square().mean().backward()
    assert names == ["1.experts.gate_up_proj", "1.experts.down_proj"]
    return {name: p.grad for name, p in model.named_parameters()}


def two_parts():
    return torch.nn.Sequential(torch.nn.Linear(H, H), MoELayer(H, INNER, 5, top_k=2))


def test_with_data_parallelism(ranks):
    model = two_parts()
    x = torch.randn(ranks.world_size, 6, H)
    model(x).square().mean().backward()
    results = ranks.run(train_on_rank, [(model.state_dict(), part) for part in x])
    for name, p in model.named_parameters():
        if "experts" in name:  # a sum of the ranks' means
            got = torch.cat([grads[name] for grads in results]) / ranks.world_size
        else:
            got = results[0][name]
            assert all(torch.equal(grads[name], got) for grads in results)
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(got, p.grad, rtol=0, atol=1e-5 * scale)


def initial_on_rank(seed):
    torch.manual_seed(seed)
    experts = ParallelExperts(H, INNER, 7)
    return experts.gate_up_proj.detach(), experts.down_proj.detach()


def test_equal_seeds_draw_what_one_process_draws(ranks):
    got = zip(*ranks.run(initial_on_rank, [(5,)] * ranks.world_size), strict=True)
    torch.manual_seed(5)
    for parts, whole in zip(got, Experts(H, INNER, 7).parameters(), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def load_on_rank(state, dtype, dst):
    layer = torch.nn.Sequential(MoELayer(H, INNER, 5, dtype=dtype))
    layer[0].experts = ParallelExperts(H, INNER, 5, dtype=dtype)
    keys = layer.load_state_dict(state)
    again = torch.nn.Sequential(MoELayer(H, INNER, 5, dtype=dtype))
    again[0].experts = ParallelExperts(H, INNER, 5, dtype=dtype)
    again.load_state_dict(layer.state_dict())
    whole = full_state_dict(again, dst)
    return list(keys), whole, per_expert_state_dict(again, "mixtral")


@pytest.mark.parametrize("dst", [None, 1])
@pytest.mark.parametrize("layout", ["fused", "projections", "mixtral"])
def test_state_dicts_are_divided_and_put_together(ranks, layout, dst):
    dtype = torch.bfloat16
    layer = torch.nn.Sequential(MoELayer(H, INNER, 5, dtype=dtype))
    fused = layer.state_dict()
    state = fused if layout == "fused" else per_expert_state_dict(layer, layout)
    results = ranks.run(load_on_rank, [(state, dtype, dst)] * ranks.world_size)
    by_expert = {}
    for rank, (keys, whole, own) in enumerate(results):
        assert keys == [[], []]
        assert whole.keys() == (fused.keys() if dst in (None, rank) else set())
        assert all(torch.equal(whole[k], fused[k]) and whole[k].dtype == dtype for k in whole)
        by_expert |= own
    expected = per_expert_state_dict(layer, "mixtral")
    assert by_expert.keys() == expected.keys()
    assert all(torch.equal(by_expert[k], expected[k]) for k in expected)


def bad_load_on_rank(state):
    ParallelExperts(H, INNER, 5).load_state_dict(state)


BAD_STATES = [
    ({"gate_up_proj": (4, 2 * INNER, H)}, "size mismatch for gate_up_proj"),
    ({"4.w1.weight": (INNER, H), "5.w1.weight": (INNER, H)}, 'Unexpected key.*"5.w1.weight"'),
    ({"0.w1.weight": (INNER, H)}, 'Missing key.*"1.w3.weight"'),
]


@pytest.mark.parametrize("shapes, message", BAD_STATES)
def test_rejects_a_state_dict_that_does_not_fit(pools, shapes, message):
    state = {"down_proj": (5, H, INNER)} if "gate_up_proj" in shapes else {}
    state = {name: torch.zeros(shape) for name, shape in (state | shapes).items()}
    first, _ = pools(2).try_run(bad_load_on_rank, [(state,)] * 2)
    assert isinstance(first, Failure) and first.kind == "RuntimeError"
    assert re.search(message, first.message), first.message


def disagree_on_rank(changes):
    options = {"hidden": H, "intermediate": INNER, "num_experts": 6, "dtype": torch.float32}
    options |= {
        "activation": "silu",
        "counts": None,
        "frozen": (),
        "bad_id": False,
        "grad": True,
    } | changes
    hidden, dtype = options["hidden"], options["dtype"]
    experts = ParallelExperts(
        hidden,
        options["intermediate"],
        options["num_experts"],
        activation=options["activation"],
        experts_per_rank=options["counts"],
        dtype=dtype,
    )
    x, _, weights, _ = tokens_of(4, 6, 2, dtype, seed=0)
    x = torch.zeros(4, hidden, dtype=dtype, requires_grad="x" not in options["frozen"])
    weights.requires_grad_("weights" not in options["frozen"])
    experts.requires_grad_("experts" not in options["frozen"])
    ids = torch.tensor([[0, 1]] * 4, dtype=torch.int32)
    ids -= int(options["bad_id"])
    with torch.set_grad_enabled(options["grad"]):
        return experts(x, ids, weights).shape


SAME = "expected all ranks to have the same"
DISAGREEMENTS = [
    ({"dtype": torch.bfloat16}, "TypeError", f"{SAME} dtype, got torch.float32 on ranks [0, 2]"),
    ({"hidden": 16}, "ValueError", f"{SAME} hidden size, got {H} on ranks [0, 2], 16 on ranks [1]"),
    (
        {"intermediate": 8},
        "ValueError",
        f"{SAME} intermediate size, got {INNER} on ranks [0, 2], 8 on",
    ),
    ({"num_experts": 7}, "ValueError", f"{SAME} activation and experts_per_rank"),
    ({"counts": [1, 2, 3]}, "ValueError", f"{SAME} activation and experts_per_rank"),
    ({"activation": "gelu"}, "ValueError", f"{SAME} activation and experts_per_rank"),
    ({"frozen": ["x"]}, "ValueError", f"{SAME} gradient of x, got 1 on ranks [0, 2], 0 on ranks"),
    ({"frozen": ["weights"]}, "ValueError", f"{SAME} gradient of topk_weights"),
    ({"frozen": ["experts"]}, "ValueError", f"{SAME} gradient of the experts"),
    ({"grad": False}, "ValueError", f"{SAME} gradient of x"),
]


@pytest.mark.parametrize("changes, kind, message", DISAGREEMENTS)
def test_ranks_that_disagree_all_say_so(pools, changes, kind, message):
    results = pools(3).try_run(disagree_on_rank, [({},), (changes,), ({},)])
    assert [result.kind for result in results] == [kind] * 3
    assert all(message in result.message for result in results), results[0].message
    # And the group still works.
    assert pools(3).run(disagree_on_rank, [({},)] * 3) == [(4, H)] * 3


def test_an_error_on_one_rank_reaches_all(pools):
    results = pools(3).try_run(disagree_on_rank, [({},), ({"bad_id": True},), ({},)])
    assert [result.kind for result in results] == ["RuntimeError", "IndexError", "RuntimeError"]
    assert "refused on ranks [1]" in results[0].message
    assert "got -1 at" in results[1].message


def test_split_experts():
    assert split_experts(7, 3) == [3, 2, 2] and split_experts(6, 2) == [3, 3]
    with pytest.raises(ValueError, match="one expert for each of 3 ranks, got 2"):
        split_experts(2, 3)


@pytest.mark.parametrize("counts", [[6], [6, 0], [3, 4], [1, 2, 3]])
def test_rejects_a_split_that_does_not_fit(pools, counts):
    results = pools(2).try_run(disagree_on_rank, [({"counts": counts},)] * 2)
    assert all("2 positive numbers that add up to num_experts = 6" in r.message for r in results)
