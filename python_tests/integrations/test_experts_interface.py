import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import activations

from mergeme_ext.integrations.experts_interface import fused_activation
from mergeme_ext.integrations.transformers import register
from python_tests.support import experts_classes
from python_tests.support.experts_classes import build, inputs
from python_tests.support.experts_runs import assert_as_good, exact, run

register()

# Some classes' eager code computes in a wider type than the interface's other implementations.
PEERS = ("eager", "batched_mm")
CLASSES = experts_classes.decorated()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERY_CLASS = pytest.mark.parametrize("module, name", CLASSES, ids=[name for _, name in CLASSES])


def test_every_wrapped_class_is_found():
    found = {(module, name) for module in dict(CLASSES) for name in experts_classes.wrapped(module)}
    assert found == set(CLASSES) and len(found) > 60


@EVERY_CLASS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_class_computes_and_trains_as_eager_does(module, name, dtype):
    experts = build(module, name, dtype)
    x, ids, weights = inputs(experts, dtype=dtype)
    grad = torch.randn_like(x)
    expected = exact(experts, x, ids, weights, grad)
    peers = [run(experts, kind, x, ids, weights, grad) for kind in PEERS]
    if dtype == torch.float64:
        peers += scaled_from_float32(module, name, grad, expected)
    assert_as_good(run(experts, "mergeme", x, ids, weights, grad), expected, peers)


def scaled_from_float32(module, name, grad, expected):
    """float64's errors cannot be read off a float64 reference, which has its own; they are those of
    float32 times the ratio of the units."""
    experts = build(module, name)
    x, ids, weights = inputs(experts)
    exact32 = exact(experts, x, ids, weights, grad.float())
    for kind in PEERS:
        peer = run(experts, kind, x, ids, weights, grad.float())
        yield [
            None if e is None else e + 2.0**-29 * (p.double() - e32)
            for p, e32, e in zip(peer, exact32, expected, strict=True)
        ]


@EVERY_CLASS
def test_every_class_leaves_out_other_processes_experts(module, name):
    experts = build(module, name)
    experts._is_expert_parallel = True
    x, ids, weights = inputs(experts, num_tokens=12)
    ids[::2, 1] = ids[3] = experts.num_experts
    weights = weights.masked_fill(ids == experts.num_experts, 0.0)
    grad = torch.randn_like(x)
    expected = exact(experts, x, ids, weights, grad)
    # The eager code of three classes knows no such ids; batched_mm does in all.
    peers = [run(experts, "batched_mm", x, ids, weights, grad)]
    ours = run(experts, "mergeme", x, ids, weights, grad)
    assert_as_good(ours, expected, peers)
    assert not ours[0][3].any() and not ours[1][3].any() and not ours[2][ids == 5].any()


# Their gate, bias or norm is their own, or they have no gate: grouped matmuls around it.
IN_STEPS = {
    "BeamExperts",
    "DeepseekV4Experts",
    "Glm5NextTextExperts",
    "GptOssExperts",
    "HYV4Experts",
    "Inkling2Experts",
    "MiniMaxM3VLExperts",
    "MuseSparkExperts",
    "NemotronHExperts",
    "OpenAIPrivacyFilterExperts",
}


@EVERY_CLASS
def test_what_can_be_fused_is(module, name):
    experts = build(module, name)
    found = fused_activation(experts)
    # Later versions of transformers bring classes that the set above does not know.
    own_gate = type(experts)._apply_gate.__name__ != "_default_apply_gate"
    in_steps = own_gate or name in IN_STEPS
    gelu = name in {"DiffusionGemmaTextExperts", "Gemma4TextExperts"}
    assert found == (None if in_steps else "gelu_tanh" if gelu else "silu")


MIXTRAL = ("mixtral.modeling_mixtral", "MixtralExperts")
GPT_OSS = ("gpt_oss.modeling_gpt_oss", "GptOssExperts")


class LouderSiLU(activations.SiLUActivation):
    def forward(self, x):
        return 2 * super().forward(x)


def other_gate(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(up) * gate


def hooked(experts):
    experts.act_fn.register_forward_hook(lambda module, args, out: 2 * out)


def replaced_forward(experts):
    experts.act_fn.forward = F.relu


def replaced_gate(experts):
    experts._apply_gate = other_gate.__get__(experts)


def gate_of_a_subclass(experts):
    experts.__class__ = type("Other", (type(experts),), {"_apply_gate": other_gate})


def set_activation(experts, act):
    del experts.act_fn  # a plain function cannot take a module's place
    experts.act_fn = act


def activation(act):
    return lambda experts: set_activation(experts, act)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced_forward,
        replaced_gate,
        gate_of_a_subclass,
        activation(LouderSiLU()),
        activation(activations.FastGELUActivation()),
        activation(activations.ClippedGELUActivation(-10, 10)),
        activation(nn.ReLU()),
        activation(F.relu),
        activation(torch.tanh),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_changed_gate_or_activation_is_not_fused(change, training):
    experts = build(*MIXTRAL)
    x, ids, weights = inputs(experts)
    plain = run(experts, "mergeme", x, ids, weights)[0]
    change(experts)
    assert fused_activation(experts) is None
    with torch.set_grad_enabled(training):
        ours = run(experts, "mergeme", x, ids, weights)[0]
        torch.testing.assert_close(ours, run(experts, "batched_mm", x, ids, weights)[0])
    assert not torch.allclose(ours, plain)


@pytest.mark.parametrize(
    "act, expected",
    [
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (activations.ACT2FN["silu"], "silu"),
        (activations.ACT2FN["swish"], "silu"),
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (activations.ACT2FN["gelu"], "gelu"),
        (activations.ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (activations.ACT2FN["gelu_new"], "gelu_tanh"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_known_activations(act, expected, dtype):
    experts = build(*MIXTRAL, dtype)
    set_activation(experts, act)
    assert fused_activation(experts) == expected
    x, ids, weights = inputs(experts, dtype=dtype)
    grad = torch.randn_like(x)
    expected = exact(experts, x, ids, weights, grad)
    peers = [run(experts, kind, x, ids, weights, grad) for kind in PEERS]
    assert_as_good(run(experts, "mergeme", x, ids, weights, grad), expected, peers)


@pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS, ("aria.modeling_aria", "AriaExperts")])
@pytest.mark.parametrize("num_tokens, top_k", [(0, 2), (1, 1), (17, 5), (130, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_sizes(kind, num_tokens, top_k, training):
    experts = build(*kind)
    x, ids, weights = inputs(experts, num_tokens, top_k)
    grad = torch.randn_like(x)
    if top_k == 1:
        ids[:] = 3  # one expert takes all
    if num_tokens == 0 and not training:
        with torch.no_grad():
            assert run(experts, "mergeme", x, ids, weights)[0].shape == x.shape
        return
    expected = exact(experts, x, ids, weights, grad) if num_tokens else None
    if not training:
        with torch.no_grad():
            ours = run(experts, "mergeme", x, ids, weights)
            peers = [run(experts, "eager", x, ids, weights)]
        assert_as_good(ours, expected[:1], peers)
        return
    ours = run(experts, "mergeme", x, ids, weights, grad)
    if num_tokens:
        peers = [run(experts, "eager", x, ids, weights, grad)]
        assert_as_good(ours, expected, peers)
    else:
        assert ours[0].shape == x.shape and not any(g.any() for g in ours[3:])


@EVERY_CLASS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_every_class_without_gradients(module, name, dtype):
    experts = build(module, name, dtype)
    x, ids, weights = inputs(experts, dtype=dtype)
    with torch.enable_grad():
        expected = exact(experts, x, ids, weights, torch.ones_like(x))[:1]
    peers = [run(experts, kind, x, ids, weights) for kind in PEERS]
    ours = run(experts, "mergeme", x, ids, weights)
    assert_as_good(ours, expected, peers)
    assert torch.equal(run(experts, "mergeme", x, ids, weights)[0], ours[0])


@pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(kind, weight_type, low):
    experts = build(*kind, weight_type)
    x, ids, weights = inputs(experts)
    grad = torch.randn_like(x)
    expected = exact(experts, x, ids, weights, grad)
    with torch.autocast("cpu", low):
        peers = [run(experts, "eager", x, ids, weights, grad)]
        ours = run(experts, "mergeme", x, ids, weights, grad)
        with torch.no_grad():
            inference = run(experts, "mergeme", x, ids, weights)
    assert [g.dtype for g in ours] == [g.dtype for g in peers[0]]
    assert_rounded_to(low, ours, expected, peers)
    assert_rounded_to(low, inference, expected[:1], peers)


def assert_rounded_to(low, ours, expected, peers):
    for i, (a, e) in enumerate(zip(ours, expected, strict=True)):
        allowed = max((p[i].double() - e).abs().max().item() for p in peers)
        error = (a.double() - e).abs().max().item()
        assert error <= 2 * allowed + torch.finfo(low).eps * e.abs().max().item(), i


@pytest.mark.parametrize("x_type, weight_type", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_other_dtypes_than_the_weights(x_type, weight_type):
    x_type, weight_type = getattr(torch, x_type), getattr(torch, weight_type)
    experts = build(*MIXTRAL, weight_type)
    x, ids, weights = inputs(experts, dtype=x_type)
    ours = run(experts, "mergeme", x, ids, weights)[0]
    assert ours.dtype == x_type
    same = run(experts, "mergeme", x.to(weight_type), ids, weights)[0]
    assert torch.equal(ours, same.to(x_type))


def test_routing_of_other_types_and_strides():
    experts = build(*MIXTRAL, torch.bfloat16)
    x, ids, weights = inputs(experts, dtype=torch.bfloat16)
    expected = run(experts, "mergeme", x, ids, weights.bfloat16().float())[0]
    strided = x.repeat(1, 2)[:, : x.shape[1]]
    columns = ids.int().t().contiguous().t()
    assert torch.equal(run(experts, "mergeme", strided, columns, weights.bfloat16())[0], expected)


@pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS])
@pytest.mark.parametrize("bad", [-1, 5, 6, 2**31 + 1, 2**32, -(2**32)])
@pytest.mark.parametrize("training", [False, True])
def test_ids_out_of_range(kind, bad, training):
    experts = build(*kind)
    x, ids, weights = inputs(experts)
    ids[4, 1] = bad
    with torch.set_grad_enabled(training):
        with pytest.raises(IndexError, match="topk_ids"):
            run(experts, "mergeme", x, ids, weights)
        if bad != 5:  # the sentinel of an expert-parallel group
            experts._is_expert_parallel = True
            with pytest.raises(IndexError, match="topk_ids"):
                run(experts, "mergeme", x, ids, weights)


@pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS])
@pytest.mark.parametrize("training", [False, True])
def test_nan_stays_with_its_token(kind, training):
    experts = build(*kind)
    x, ids, weights = inputs(experts)
    weights[2] = float("nan")
    x[5, 0] = float("nan")
    with torch.set_grad_enabled(training):
        eager = run(experts, "eager", x, ids, weights)[0]
        ours = run(experts, "mergeme", x, ids, weights)[0]
    assert ours.isnan().any(1).nonzero().flatten().tolist() == [2, 5]
    torch.testing.assert_close(ours, eager, equal_nan=True)


def test_second_derivatives_raise():
    experts = build(*MIXTRAL, torch.float64)
    x, ids, weights = inputs(experts, dtype=torch.float64)
    experts.config._experts_implementation = "mergeme"
    x.requires_grad_()
    (grad,) = torch.autograd.grad(experts(x, ids, weights).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS])
def test_gradients_of_float64(kind):
    experts = build(*kind, torch.float64)
    experts.config._experts_implementation = "mergeme"
    x, ids, weights = inputs(experts, 4, 2, dtype=torch.float64)
    names = list(dict(experts.named_parameters()))

    def call(x, weights, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, values, (x, ids, weights))

    tensors = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    torch.autograd.gradcheck(call, (x.requires_grad_(), weights.requires_grad_(), *tensors))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        MIXTRAL,
        GPT_OSS,
        ("aria.modeling_aria", "AriaExperts"),
        ("gemma4.modeling_gemma4", "Gemma4TextExperts"),
        ("muse_spark.modeling_muse_spark", "MuseSparkExperts"),
        ("nemotron_h.modeling_nemotron_h", "NemotronHExperts"),
    ],
)
@pytest.mark.parametrize("parallel", [False, True])
def test_compiles_whole(kind, parallel):
    experts = build(*kind)
    experts.config._experts_implementation = "mergeme"
    experts._is_expert_parallel = parallel
    torch.compiler.reset()  # all classes share the code object of one forward
    compiled = torch.compile(experts, fullgraph=True)
    for num_tokens in (9, 4):
        x, ids, weights = inputs(experts, num_tokens)
        if parallel:
            ids[1] = experts.num_experts
        expected = run(experts, "mergeme", x, ids, weights, torch.ones_like(x))
        experts.zero_grad()
        x.requires_grad_(), weights.requires_grad_()
        out = compiled(x, ids, weights)
        out.sum().backward()
        ours = [out.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())]
        torch.testing.assert_close(ours, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, ids, weights), expected[0])
