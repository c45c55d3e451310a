import json

import pytest
import torch

from mergeme_ext.io import CheckpointSource, names, portable_name, with_dtype
from mergeme_ext.io.names import Part, PartKind
from python_tests.support.checkpoints import llama_tensors, save


def test_every_llama_tensor_has_its_part():
    parts = {name: names.part_of(name) for name in llama_tensors()}
    assert None not in parts.values()
    assert parts["model.layers.1.mlp.down_proj.weight"] == Part(PartKind.FFN, 1, "down")
    assert parts["model.layers.0.self_attn.q_proj.weight"] == Part(PartKind.ATTENTION, 0, "q")
    assert parts["model.norm.weight"] == Part(PartKind.NORM, None, "final")
    assert parts[names.HEAD].kind == PartKind.HEAD
    bias = names.part_of("model.layers.10.self_attn.k_proj.bias")
    assert bias == Part(PartKind.ATTENTION, 10, "k", bias=True)
    buffer = names.part_of("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert buffer == Part(PartKind.BUFFER, 3, "inv_freq")
    assert names.part_of("model.layers.0.block_sparse_moe.gate.weight") is None
    assert names.part_of(names.ffn_name(7, "up")) == Part(PartKind.FFN, 7, "up")


def test_mixtral_names():
    at = "model.layers.2.block_sparse_moe."
    assert names.mixtral_router_name(2) == at + "gate.weight"
    kinds = {role: names.mixtral_expert_name(2, 5, role) for role in ("gate", "up", "down")}
    assert kinds == {
        "gate": at + "experts.5.w1.weight",
        "up": at + "experts.5.w3.weight",
        "down": at + "experts.5.w2.weight",
    }


def test_which_models_are_supported(tmp_path):
    assert names.supported(CheckpointSource(save(tmp_path, llama_tensors())).config)
    assert names.supported({"model_type": "mistral"})
    assert not names.supported({"model_type": "gpt2"}) and not names.supported({})


def test_dtype_goes_under_the_name_that_is_there():

    assert with_dtype({"torch_dtype": "float32"}, torch.bfloat16) == {"torch_dtype": "bfloat16"}
    assert with_dtype({"a": 1}, torch.float16) == {"a": 1, "dtype": "float16"}
    assert with_dtype({"dtype": "float32"}, None) == {"dtype": "float32"}
    assert with_dtype({}, torch.float16) == {}
    assert json.dumps(with_dtype({"dtype": "x"}, torch.float32)) == '{"dtype": "float32"}'


def test_public_names_hold_no_path(tmp_path):
    assert portable_name(tmp_path / "deep" / "model") == "model"
    cached = tmp_path / "models--owner--some-model" / "snapshots" / "0123abcd"
    assert portable_name(cached) == "owner/some-model"


@pytest.mark.parametrize(
    "name, module",
    [
        ("model.layers.3.mlp.up_proj.weight", "text_decoder"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "text_decoder"),
        ("lm_head.weight", "text_decoder"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision_tower"),
        ("visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        ("mtp.fc.weight", None),
    ],
)
def test_modules(name, module):
    assert names.module_of(name) == module


def test_modules_among_those_asked_for():
    assert names.module_of("visual.merger.mlp.0.weight", ["vision_tower"]) == "vision_tower"
    assert names.module_of("visual.merger.mlp.0.weight", ["text_decoder", "default"]) is None


@pytest.mark.parametrize(
    "name, before",
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wpe.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("model.layernorm_embed.weight", False),
        ("transformer.word_embeddings_layernorm.weight", True),
    ],
)
def test_what_comes_before_the_layers(name, before):
    assert names.is_before_layers(name) is before


LLAVA = "language_model.model.embed_tokens.weight"
MTP = "model.layers.61."


@pytest.mark.parametrize(
    "found, embedding, head, others",
    [
        ([*llama_tensors()], names.EMBEDDING, names.HEAD, []),
        ([*llama_tensors(head=False)], names.EMBEDDING, None, []),
        ([names.EMBEDDING, names.HEAD, "lm_head.bias"], names.EMBEDDING, names.HEAD, [2]),
        ([LLAVA, "language_model.lm_head.weight"], LLAVA, "language_model.lm_head.weight", []),
        (["transformer.wte.weight", "transformer.wpe.weight"], "transformer.wte.weight", None, []),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], "gpt_neox.embed_in.weight", 1, []),
        (
            [names.EMBEDDING, f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"],
            names.EMBEDDING,
            None,
            [1, 2],
        ),
        (["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], None, None, []),
        ([names.EMBEDDING, "model.embed_tokens_per_layer.weight"], None, None, []),
        (["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"], None, None, []),
        ([], None, None, []),
    ],
)
def test_which_tensors_have_a_row_for_each_token(found, embedding, head, others):
    head = found[head] if isinstance(head, int) else head
    expected = names.VocabularyNames(embedding, head, frozenset(found[i] for i in others))
    assert names.vocabulary_names(found) == expected
    assert expected.every == {embedding, head, *expected.others} - {None}


def test_how_experts_are_stored():
    single = "model.layers.0.mlp.experts.0.up_proj.weight"
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert names.expert_storage([single, "x"]) == "one by one"
    assert names.expert_storage([fused, "x"]) == "fused"
    assert names.expert_storage([fused, single]) is names.expert_storage(["x"]) is None
    assert names.expert_storage(["model.layers.0.mlp.shared_experts.up_proj.weight"]) is None
