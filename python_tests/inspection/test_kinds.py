import pytest

from mergeme_ext.inspection.kinds import kind_of, kind_order, layer_of


@pytest.mark.parametrize(
    "name, kind, layer",
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("lm_head.weight", "head", None),
        ("model.norm.weight", "norm final", None),
        ("model.layers.12.self_attn.q_proj.weight", "attention q", 12),
        ("model.layers.0.self_attn.v_proj.bias", "attention v bias", 0),
        ("model.layers.3.mlp.down_proj.weight", "mlp down", 3),
        ("model.layers.3.input_layernorm.weight", "norm input", 3),
        ("model.layers.7.mlp.experts.41.gate_proj.weight", "mlp.experts.*.gate_proj", 7),
        ("model.layers.7.self_attn.q_norm.weight", "self_attn.q_norm", 7),
        ("transformer.h.5.attn.c_attn.bias", "attn.c_attn.bias", 5),
        ("vision.patch_embed.weight", "vision.patch_embed", None),
        ("scale", "scale", None),
        ("weight", "weight", None),
        ("blocks.4", "blocks.4", 4),
    ],
)
def test_kind_and_layer(name, kind, layer):
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def test_order():
    found = ["head", "other", "mlp up", "attention o", "embedding", "other"]
    assert kind_order(found) == ["embedding", "attention o", "mlp up", "head", "other"]
