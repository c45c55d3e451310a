"""What transformers would say of a checkpoint, from names and shapes alone."""

import json

import pytest
import torch
from safetensors import safe_open

from mergeme_ext.integrations.model_check import ModelCheck, problems_of

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "head_dim": 8,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts=4, moe_intermediate_size=8
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0
    ),
}


def saved(folder, config, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **options)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), shapes


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saves_it_would_load(tmp_path, kind):
    assert problems_of(*saved(tmp_path, CONFIGS[kind]())) == []


def test_both_layouts_of_experts_load(tmp_path):
    config, shapes = saved(tmp_path, CONFIGS["mixtral"](), save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in shapes)
    assert problems_of(config, shapes) == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_problems_are_told_apart(tmp_path, kind):
    config, shapes = saved(tmp_path, CONFIGS[kind]())
    first, *_, last = sorted(n for n in shapes if "norm" in n or "ln_" in n)
    del shapes[first]
    shapes[last] = [7]
    shapes["model.extra.weight"] = [2]
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = [4]  # old, and computed anyway
    missing, unknown, misshapen = problems_of(config, shapes)
    assert missing == f"it would miss {first}"
    assert unknown == "it would not know model.extra.weight"
    assert misshapen.startswith(f"of another shape: {last} is [7], expected [")


@pytest.mark.slow
def test_asks_in_a_process_of_its_own(tmp_path):
    config, shapes = saved(tmp_path, CONFIGS["llama"]())
    assert ModelCheck(config, shapes.items()).problems() == []
    del shapes["model.norm.weight"]
    assert ModelCheck(config, shapes.items()).problems() == ["it would miss model.norm.weight"]


def test_who_cannot_be_asked_has_no_complaint():
    assert ModelCheck({}, []).problems() == []
    unknown = {"model_type": "none", "architectures": ["NoneForCausalLM"]}
    assert ModelCheck(unknown, []).problems() == []
    stopped = ModelCheck(unknown, [])
    stopped.cancel()
    assert stopped.problems() == []
