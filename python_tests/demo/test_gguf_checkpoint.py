import json

import numpy as np
import pytest
import torch

from mergeme_ext.demo.gguf_checkpoint import checkpoint_name, convert, unpermute
from mergeme_ext.io import CheckpointSource

HIDDEN, HEADS, KV_HEADS, FFN = 32, 4, 2, 64


def permute(weight, heads):
    """What the writer of a GGUF file does to Q and K, row by row."""
    rows = len(weight)
    size = rows // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + i + size // 2]
    return out


@pytest.mark.parametrize("heads, size", [(1, 2), (3, 8), (9, 64)])
def test_unpermute_undoes_the_writer(heads, size):
    weight = np.random.default_rng(0).normal(size=(heads * size, 5))
    np.testing.assert_array_equal(unpermute(permute(weight, heads), heads), weight)


def test_unpermute_refuses_odd_heads():
    with pytest.raises(ValueError, match=r"multiple of 2 \* 3 heads, got 9"):
        unpermute(np.zeros((9, 2)), 3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.12.attn_k.weight", "model.layers.12.self_attn.k_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_names(name, expected):
    assert checkpoint_name(name) == expected


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.ffn_gate", "mm.0.weight"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="has no place"):
        checkpoint_name(name)


def write_gguf(path, architecture="llama"):
    """Write a GGUF file by the reference library; return its weights as transformers names them."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|endoftext|>", *letters, "Ġ", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    block = "model.layers.0."
    weights = {
        "model.embed_tokens.weight": normal(len(tokens), HIDDEN),
        "model.norm.weight": normal(HIDDEN),
        block + "input_layernorm.weight": normal(HIDDEN),
        block + "post_attention_layernorm.weight": normal(HIDDEN),
        block + "self_attn.q_proj.weight": normal(HIDDEN, HIDDEN),
        block + "self_attn.k_proj.weight": normal(kv, HIDDEN),
        block + "self_attn.v_proj.weight": normal(kv, HIDDEN),
        block + "self_attn.o_proj.weight": normal(HIDDEN, HIDDEN),
        block + "mlp.gate_proj.weight": normal(FFN, HIDDEN),
        block + "mlp.up_proj.weight": normal(FFN, HIDDEN),
        block + "mlp.down_proj.weight": normal(HIDDEN, FFN),
    }
    names = {
        "embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "blk.0.attn_norm",
        "post_attention_layernorm": "blk.0.ffn_norm",
        "q_proj": "blk.0.attn_q",
        "k_proj": "blk.0.attn_k",
        "v_proj": "blk.0.attn_v",
        "o_proj": "blk.0.attn_output",
        "gate_proj": "blk.0.ffn_gate",
        "up_proj": "blk.0.ffn_up",
        "down_proj": "blk.0.ffn_down",
    }
    for name, value in weights.items():
        stem = next(new for old, new in names.items() if name.endswith(f"{old}.weight"))
        if "q_proj" in name or "k_proj" in name:
            value = permute(value, HEADS if "q_proj" in name else KV_HEADS)
        # Q8_0 where the block size allows it, as in the package's file.
        if "down_proj" in name:
            quantized = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            weights[name] = gguf.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{stem}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{stem}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(v.copy()).to(torch.bfloat16) for name, v in weights.items()}


def test_converts_a_small_model_that_transformers_loads(tmp_path):
    weights = write_gguf(tmp_path / "m.gguf")
    out = convert(tmp_path / "m.gguf", tmp_path / "model", {"package": "x"})
    source = CheckpointSource(out)
    assert sorted(source.names) == sorted(weights)
    for name, value in weights.items():
        assert torch.equal(source.tensor(name), value), name
    assert source.config["tie_word_embeddings"] and source.config["rms_norm_eps"] == 1e-5
    assert json.loads((out / "provenance.json").read_text()) == {"package": "x"}

    from mergeme_ext.demo.language_model import load_model, load_tokenizer

    tokenizer = load_tokenizer(out)
    ids = tokenizer("ab ba", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "ab ba" and len(ids) == 4
    model = load_model(out)
    assert model(torch.tensor([ids])).logits.shape == (1, 4, 29)


def test_refuses_another_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen2")
    with pytest.raises(ValueError, match="expected a llama GGUF file, got 'qwen2'"):
        convert(tmp_path / "m.gguf", tmp_path / "model", {})
    assert not (tmp_path / "model").exists()
