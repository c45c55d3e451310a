import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mergeme_ext.integrations.transformers import use_mergeme_experts
from mergeme_ext.moe import MoELayer
from python_tests.references.mixtral import logits as reference


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=None,
    )
    return MixtralForCausalLM(config).eval()


IDS = torch.tensor([[3, 17, 1, 44, 60, 9, 9, 2, 31]])


@torch.no_grad()
def test_logits_match_stock_and_a_float64_loop(model):
    stock = model(IDS).logits[0]
    with use_mergeme_experts(model):
        ours = model(IDS).logits[0]
    config = model.config.to_dict() | {"head_dim": 6}
    exact = reference(on_disk(model), config, IDS[0])
    error = [(x.double() - exact).abs().max().item() for x in (ours, stock)]
    unit = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error[0] <= 2 * error[1] + unit and exact.abs().max() > 0.1


def on_disk(model):
    """Tensors under the names that save_pretrained writes."""
    tensors = {}
    for name, value in model.state_dict().items():
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        if name.endswith("gate_up_proj"):
            prefix = name.replace(".mlp.", ".block_sparse_moe.").removesuffix("gate_up_proj")
            for e, (gate, up) in enumerate(x.chunk(2) for x in value):
                tensors[f"{prefix}{e}.w1.weight"], tensors[f"{prefix}{e}.w3.weight"] = gate, up
        elif name.endswith("down_proj"):
            prefix = name.replace(".mlp.", ".block_sparse_moe.").removesuffix("down_proj")
            tensors |= {f"{prefix}{e}.w2.weight": x for e, x in enumerate(value)}
        else:
            tensors[name] = value
    return tensors


@torch.no_grad()
def test_blocks_compute_what_the_layer_computes(model):
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 24)
    with use_mergeme_experts(model):
        assert torch.equal(block(x), MoELayer.from_mixtral(block)(x))


@torch.no_grad()
def test_router_logits_loss_and_cache_still_work(model):
    stock = model(IDS, output_router_logits=True, labels=IDS)
    text = model.generate(IDS, max_new_tokens=5, do_sample=False)
    with use_mergeme_experts(model):
        ours = model(IDS, output_router_logits=True, labels=IDS)
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), text)
    assert len(ours.router_logits) == len(stock.router_logits) == 2
    for a, b in zip(ours.router_logits, stock.router_logits, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.aux_loss, stock.aux_loss)
    torch.testing.assert_close(ours.loss, stock.loss)


@torch.no_grad()
def test_restores_and_keeps_names(model, tmp_path):
    names, before = list(model.state_dict()), model(IDS).logits
    swap = use_mergeme_experts(model)
    assert "forward" in vars(model.model.layers[0].mlp.gate)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    swap.restore()
    assert "forward" not in vars(model.model.layers[0].mlp.gate)
    assert torch.equal(model(IDS).logits, before)
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, before)


@torch.no_grad()
def test_a_deep_copy_runs_its_own_weights(model):
    use_mergeme_experts(model)
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.mlp.experts.down_proj.zero_()
    expected = other(IDS).logits
    assert not torch.equal(model(IDS).logits, expected)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.zero_()
    assert torch.equal(model(IDS).logits, expected)


def test_trains(model):
    with use_mergeme_experts(model):
        model.train()(IDS, labels=IDS).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            ours[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item()
        )


def test_rejects_a_model_without_experts():
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(ValueError, match="got LlamaForCausalLM without one"):
        use_mergeme_experts(dense)


def test_rejects_another_activation(model):
    model.model.layers[1].mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="activation silu, got GELU"):
        use_mergeme_experts(model)
    assert "forward" not in vars(model.model.layers[0].mlp.gate)


@pytest.mark.slow
@torch.no_grad()
def test_compile_matches_eager(model):
    with use_mergeme_experts(model):
        block = model.model.layers[0].mlp
        x = torch.randn(1, 7, 24)
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
