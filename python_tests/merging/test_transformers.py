"""Real round trips: transformers writes the inputs and loads the result."""

import pytest
import torch

from mergeme_ext.io import CheckpointSource
from mergeme_ext.merging import MergeSpec, merge

pytestmark = pytest.mark.slow


def save_llama(folder, seed, *, dtype=torch.float32, tied=False, shard="50GB"):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load(folder):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (kind, report[kind])
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_of_sharded_models_loads(tmp_path, dtype, tied):
    options = {"dtype": dtype, "tied": tied}
    base = save_llama(tmp_path / "base", 0, **options)
    tuned = [save_llama(tmp_path / n, i, **options, shard="20KB") for i, n in enumerate("ab", 1)]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    source = CheckpointSource(tmp_path / "a")
    state = tuned[0].state_dict()
    assert all(torch.equal(source.tensor(n), state[n]) for n in source.names)

    spec = MergeSpec.of_models(
        "ties", [tmp_path / "a", tmp_path / "b"], base=tmp_path / "base", parameters={"weights": 1}
    )
    merge(spec, tmp_path / "out", max_shard_size="20KB")
    model = load(tmp_path / "out")
    assert model.dtype == dtype
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters())
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape == (1, 7)


def test_one_model_merged_alone_is_that_model(tmp_path):
    save_llama(tmp_path / "base", 0)
    tuned = save_llama(tmp_path / "a", 1)
    spec = MergeSpec.of_models(
        "linear", [tmp_path / "a"], base=tmp_path / "base", parameters={"weights": 1}
    )
    merge(spec, tmp_path / "out")
    ids = torch.arange(10)[None]
    assert torch.equal(load(tmp_path / "out")(ids).logits, tuned(ids).logits)
