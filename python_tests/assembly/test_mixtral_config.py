import json

import pytest
import torch
from transformers import AutoConfig, MixtralConfig

from mergeme_ext.assembly.mixtral_config import check_agreement, dense_config, mixtral_config
from mergeme_ext.io import CheckpointError

SIZES = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 19,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Written by transformers 4, by transformers 5, or with nothing said.
ROPES = [
    ({}, {"rope_type": "default", "rope_theta": 10000.0}),
    ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
    ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 5e5}),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
        {"rope_type": "default", "rope_theta": 7e4},
    ),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 7e4}}, LLAMA3 | {"rope_theta": 7e4}),
]


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("written, meant", ROPES)
def test_rotary_settings_survive(tmp_path, model_type, written, meant):
    source = SIZES | {"max_position_embeddings": 64} | written | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(source))
    dense = dense_config(source, "m")
    assert dense["rope_parameters"] == meant
    made = mixtral_config(dense, num_experts=2, experts_per_token=2, dtype="float32")
    (tmp_path / "moe.json").write_text(json.dumps(made))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = MixtralConfig.from_json_file(tmp_path / "moe.json")
    theirs.rope_parameters.pop("type", None)  # the old name stays beside the new one
    assert ours.rope_parameters == theirs.rope_parameters
    # What transformers 4 and converters read says the same.
    old = {k: v for k, v in made.items() if k != "rope_parameters"}
    (tmp_path / "moe.json").write_text(json.dumps(old))
    assert (
        MixtralConfig.from_json_file(tmp_path / "moe.json").rope_parameters
        == theirs.rope_parameters
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_defaults_are_those_of_transformers(tmp_path, model_type):
    source = SIZES | {"model_type": model_type, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(source))
    theirs = AutoConfig.from_pretrained(tmp_path)
    for key, value in dense_config(source, "m").items():
        assert getattr(theirs, key, None) == value, key
    made = mixtral_config(
        dense_config(source, "m"), num_experts=4, experts_per_token=2, dtype="bfloat16"
    )
    ours = MixtralConfig(**made)
    for key in dense_config(source, "m"):
        assert getattr(ours, key) == getattr(theirs, key, None), key
    assert ours.num_local_experts == 4 and ours.num_experts_per_tok == 2
    assert ours.dtype == torch.bfloat16 and ours.router_jitter_noise == 0.0
    assert made["architectures"] == ["MixtralForCausalLM"]


def test_fields_are_carried_over():
    source = SIZES | {
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-4,
        "eos_token_id": [1, 2],
        "pad_token_id": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 99,
        "bos_token_id": None,
    }
    made = mixtral_config(
        dense_config(source, "m"), num_experts=2, experts_per_token=1, dtype="float16"
    )
    for key, value in source.items():
        assert made[key] == ("mixtral" if key == "model_type" else value)


def test_settings_that_differ_are_told_and_structure_is_refused():
    base = dense_config(SIZES, "base")
    other = dense_config(SIZES | {"rms_norm_eps": 1e-5, "rope_theta": 5e5}, "other")
    notes = check_agreement(base, "base", other, "other")
    assert len(notes) == 2 and "rope_theta" in notes[0]
    assert notes[1] == "other has rms_norm_eps 1e-05; the result uses 1e-06 of base"
    with pytest.raises(
        CheckpointError, match="other: expected num_hidden_layers 2 as in base, got 3"
    ):
        check_agreement(base, "base", dense_config(SIZES | {"num_hidden_layers": 3}, ""), "other")


def test_mistral_and_llama_may_mix_if_they_attend_alike():
    llama = dense_config(SIZES | {"num_key_value_heads": 4, "max_position_embeddings": 64}, "l")
    mistral = SIZES | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": None}
    mistral = dense_config(mistral | {"max_position_embeddings": 64}, "m")
    assert check_agreement(llama, "l", mistral, "m") == []
