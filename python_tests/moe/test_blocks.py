"""Blocks of transformers taken over as MoELayer."""

import importlib

import pytest
import torch

from mergeme_ext.moe import MoELayer

HIDDEN, INNER, EXPERTS, TOP_K = 32, 24, 8, 3
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "experts_implementation": "eager",
}
# Name: module, its prefix, block, further settings, what the layer's options must then be.
BLOCKS = {
    "mixtral": ("mixtral", "Mixtral", "SparseMoeBlock", {}, {"renormalize": True}),
    "mixtral gelu": ("mixtral", "Mixtral", "SparseMoeBlock", {"hidden_act": "gelu"}, {}),
    "olmoe": ("olmoe", "Olmoe", "SparseMoeBlock", {}, {"renormalize": False}),
    "olmoe normalised": (
        "olmoe",
        "Olmoe",
        "SparseMoeBlock",
        {"norm_topk_prob": True, "hidden_act": "gelu_pytorch_tanh"},
        {"renormalize": True},
    ),
    "qwen2": (
        "qwen2_moe",
        "Qwen2Moe",
        "SparseMoeBlock",
        {"shared_expert_intermediate_size": 40},
        {"renormalize": False},
    ),
    "qwen3": (
        "qwen3_moe",
        "Qwen3Moe",
        "SparseMoeBlock",
        {"norm_topk_prob": True},
        {"renormalize": True, "compute_dtype": None},
    ),
    "deepseek v2": (
        "deepseek_v2",
        "DeepseekV2",
        "Moe",
        {
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
        {"num_groups": 4, "scale": 16.0, "group_score": "max", "compute_dtype": torch.float32},
    ),
    "deepseek v3": (
        "deepseek_v3",
        "DeepseekV3",
        "MoE",
        {
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        {"score": "sigmoid", "group_score": "top2", "top_groups": 2, "renormalize": True},
    ),
}


def make_block(name, dtype=torch.float32, device="cpu"):
    module, prefix, suffix, settings, _ = BLOCKS[name]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    config = getattr(configuration, f"{prefix}Config")(**COMMON | settings)
    with torch.device(device):
        block = getattr(modeling, f"{prefix}{suffix}")(config)
    if device == "cpu":
        with torch.no_grad():
            for p in block.parameters():
                p.normal_(std=p.shape[-1] ** -0.5)
            if hasattr(block.gate, "e_score_correction_bias"):
                block.gate.e_score_correction_bias.normal_(std=0.1)
    return block.to(dtype)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_computes_what_the_block_computes(name, train):
    block = make_block(name, torch.float64).train(train)
    layer = MoELayer.from_transformers(block)
    assert layer.training == train
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    parameters = dict(block.named_parameters())
    found = []
    for module in (block, layer):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out.sin().sum(), [leaf, *parameters.values()])
        found.append([out, *grads])
    for theirs, ours in zip(*found, strict=True):
        # In float64, but for the block's routing weights: softmax, quotient and scale, and in
        # DeepSeek the logits with their H products, are formed in float32 whatever the input.
        bound = (HIDDEN + EXPERTS) * 2.0**-24 * theirs.abs().max()
        assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("name", BLOCKS)
def test_finds_the_options_and_shares_the_parameters(name):
    block = make_block(name, torch.bfloat16)
    layer = MoELayer.from_transformers(block)
    for option, value in BLOCKS[name][-1].items():
        assert getattr(layer.router, option) == value, option
    theirs = {id(p) for p in block.parameters()}
    assert {id(p) for p in layer.parameters()} == theirs
    activation = BLOCKS[name][3].get("hidden_act", "silu").replace("pytorch_", "")
    assert layer.experts.activation == activation
    assert (layer.shared_expert is None) == (name[:5] not in ("qwen2", "deeps"))
    assert (layer.router.selection_bias is None) == (name != "deepseek v3")


@pytest.mark.parametrize("name", BLOCKS)
def test_takes_the_state_dict_of_the_block(name):
    block = make_block(name)
    expected = MoELayer.from_transformers(block)
    layer = MoELayer.from_transformers(make_block(name))
    x = torch.randn(5, HIDDEN)
    assert not torch.equal(layer(x), expected(x))
    assert not any(layer.load_state_dict(block.state_dict()))
    assert torch.equal(layer(x), expected(x))


def test_a_block_on_the_meta_device():
    layer = MoELayer.from_transformers(make_block("qwen2", device="meta"))
    assert all(p.is_meta for p in layer.parameters())
    layer.load_state_dict(make_block("qwen2").state_dict(), assign=True)
    assert layer(torch.randn(3, HIDDEN)).shape == (3, HIDDEN)


def test_leaves_the_block_as_it_was():
    block = make_block("deepseek v3")
    block.gate.eval()
    before = {name: t.clone() for name, t in block.state_dict().items()}
    modes = [m.training for m in block.modules()]
    MoELayer.from_transformers(block)
    assert [m.training for m in block.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


def spoilt(change):
    block = make_block("mixtral")
    change(block)
    return block


class Halved(torch.nn.Module):
    def forward(self, x):
        return x / 2


def double_output(block):
    forward = block.forward
    block.forward = lambda x: 2 * forward(x)


def reverse_halves(block):
    forward = block.experts.forward

    def swapped(*args):
        rows = block.experts.gate_up_proj
        block.experts._parameters["gate_up_proj"] = torch.cat(rows.chunk(2, dim=1)[::-1], dim=1)
        out = forward(*args)
        block.experts._parameters["gate_up_proj"] = rows
        return out

    block.experts.forward = swapped


def bad_weights(block):
    forward = block.gate.forward
    block.gate.forward = lambda x: (lambda a, b, c: (a, b.square(), c))(*forward(x))


def bad_experts(block):
    block.experts.register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))


BAD = [
    (lambda b: setattr(b.experts, "act_fn", torch.nn.ReLU()), ValueError, "activations .* ReLU"),
    (lambda b: setattr(b.experts, "act_fn", Halved()), ValueError, "activations .* Halved"),
    (lambda b: b.add_module("norm", torch.nn.LayerNorm(HIDDEN)), TypeError, r"also has \['norm"),
    (bad_experts, TypeError, r"also has \['experts.bias'\]"),
    (lambda b: delattr(b.experts, "down_proj"), TypeError, "MixtralSparseMoeBlock: .*down_proj"),
    (lambda b: delattr(b.gate, "top_k"), TypeError, "no attribute 'top_k'"),
    (reverse_halves, ValueError, "gate rows before up rows"),
    (bad_weights, ValueError, "whose weights none of its options give"),
    (double_output, ValueError, "which computes something else"),
]


@pytest.mark.parametrize("change, kind, message", BAD)
def test_refuses_a_block_that_computes_something_else(change, kind, message):
    with pytest.raises(kind, match=message):
        MoELayer.from_transformers(spoilt(change))


def test_refuses_transposed_experts():
    block = make_block("mixtral")
    block.experts.gate_up_proj = torch.nn.Parameter(block.experts.gate_up_proj.mT.clone())
    with pytest.raises(TypeError, match="gate_up_proj and down_proj are"):
        MoELayer.from_transformers(block)
