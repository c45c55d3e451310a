"""Whole models of transformers with ``experts_implementation="mergeme"``."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from mergeme_ext.integrations.transformers import pack_for_inference, register, unpack

register()

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": None,
    "head_dim": 8,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=5),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=12),
    "olmoe": OlmoeConfig(**SIZES | {"head_dim": 6}, num_experts=6),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=6),
}
IDS = torch.tensor([[3, 17, 1, 44, 60, 9, 9, 2, 31]])
MODELS = pytest.mark.parametrize("name", CONFIGS)


def make(name, implementation="eager", dtype=torch.float32):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    return model.to(dtype).eval()


@MODELS
@torch.no_grad()
def test_logits_and_greedy_ids(name):
    model = make(name)
    exact = copy.deepcopy(model).double()(IDS).logits
    eager = model(IDS).logits
    text = model.generate(IDS, max_new_tokens=20, do_sample=False)
    model.set_experts_implementation("mergeme")
    for pack in (lambda model: None, pack_for_inference):
        pack(model)
        ours = model(IDS).logits
        error = [(x.double() - exact).abs().max().item() for x in (ours, eager)]
        assert error[0] <= 2 * error[1] + torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert torch.equal(model.generate(IDS, max_new_tokens=20, do_sample=False), text)
    assert text.shape == (1, 29)


@MODELS
def test_trains_as_eager_does(name):
    grads = {}
    for kind, dtype in (("eager", torch.float64), ("eager", torch.float32), ("mergeme", None)):
        model = make(name, kind, dtype or torch.float32).train()
        model(IDS, labels=IDS).loss.backward()
        grads[kind, dtype] = {n: p.grad.double() for n, p in model.named_parameters()}
    exact, eager, ours = grads.values()
    for key, value in exact.items():
        allowed = (eager[key] - value).abs().max().item()
        unit = torch.finfo(torch.float32).eps * value.abs().max().item()
        assert (ours[key] - value).abs().max().item() <= 4 * allowed + unit, key


@MODELS
@torch.no_grad()
def test_saves_and_loads(name, tmp_path):
    model = make(name, "mergeme")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "plain")
    pack_for_inference(model)
    model.save_pretrained(tmp_path / "packed")
    plain = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert plain
    for path in plain:
        assert path.read_bytes() == (tmp_path / "packed" / path.name).read_bytes()
    for folder in ("plain", "packed"):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, experts_implementation="mergeme"
        )
        assert again.config._experts_implementation == "mergeme"
        assert torch.equal(again.eval()(IDS).logits, expected)
    # What was saved does not ask for the package.
    assert "mergeme" not in (tmp_path / "packed" / "config.json").read_text()
    unpack(model)
    assert torch.equal(model(IDS).logits, expected)


def test_adapters_on_experts():
    model = make("qwen3_moe", "mergeme")
    config = LoraConfig(
        r=4,
        lora_dropout=0.0,
        init_lora_weights=False,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    peft = get_peft_model(model, config)
    losses, grads = {}, {}
    for kind in ("eager", "mergeme"):
        model.set_experts_implementation(kind)
        for mode in (True, False):
            peft.train(mode).zero_grad()
            loss = peft(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses[kind, mode] = loss.item()
            grads[kind] = [p.grad for p in peft.parameters() if p.requires_grad]
    assert losses["eager", True] == pytest.approx(losses["mergeme", True], rel=1e-6)
    assert losses["mergeme", False] == pytest.approx(losses["mergeme", True], rel=1e-6)
    for ours, eager in zip(grads["mergeme"], grads["eager"], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5 * eager.abs().max().item())
    with torch.no_grad():
        expected = peft(input_ids=IDS).logits
        with peft.disable_adapter():
            base = peft(input_ids=IDS).logits
        assert not torch.allclose(base, expected, rtol=1e-2)
        # The merge writes past the version counter.
        torch.testing.assert_close(
            peft.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4
        )


def test_gradient_checkpointing():
    losses = []
    for checkpointing in (False, True):
        model = make("mixtral", "mergeme").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append([loss.item(), *(p.grad.sum().item() for p in model.parameters())])
    assert losses[0] == losses[1]


@pytest.mark.slow
@torch.no_grad()
def test_compiles_whole():
    model = make("mixtral", "mergeme")
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    pack_for_inference(model)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
