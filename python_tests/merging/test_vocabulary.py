"""Merges of models with different vocabularies, from the recipe to what transformers loads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeme_ext.io import CheckpointError, CheckpointSource
from mergeme_ext.merging import load_merge_specs, merge
from python_tests.references.vocabulary_rows import vocabulary_rows
from python_tests.support.checkpoints import llama_tensors
from python_tests.support.checkpoints import save as save_weights
from python_tests.vocabulary.models import FOX, LOREM, SPHINX, added, byte_bpe, save

RECIPE = """
merge_method: task_arithmetic
base_model: {folder}/base
models:
  - {{model: {folder}/chat, parameters: {{weight: 0.5}}}}
  - {{model: {folder}/code, parameters: {{weight: 0.25}}}}
tokenizer:
  source: {source}
  tokens:
    <zero>: {{source: {{kind: zero}}}}
    <old>: {{source: {{kind: model_token, model: {folder}/code, token_id: 3}}}}
    the: {{source: {folder}/chat, force: true}}
"""


@pytest.fixture
def models(tmp_path):
    tokenizers = {
        "base": (byte_bpe(FOX), 296),
        "chat": (added(byte_bpe(LOREM, 285), "<|im_end|>"), 286),
        "code": (byte_bpe(SPHINX, 280, ["<s>"]), 280),
    }
    for seed, (name, (tokenizer, rows)) in enumerate(tokenizers.items()):
        # The chat model's head is tied, the others' are not.
        tensors = llama_tensors(seed, vocab=rows, head=name != "chat")
        ids = {"bos_token_id": 0, "eos_token_id": 286 - 1 if name == "chat" else 1}
        config = {"vocab_size": rows, "tie_word_embeddings": name == "chat", **ids}
        save_weights(tmp_path / name, tensors, config)
        written = (tmp_path / name / "config.json").read_text()
        save(tmp_path / name, tokenizer, rows)
        (tmp_path / name / "config.json").write_text(written)
        (tmp_path / name / "generation_config.json").write_text(json.dumps(ids))
        (tmp_path / name / "chat_template.jinja").write_text(f"{{{{ '{name}' }}}}")
    return tmp_path


def run(models, source="union", more=""):
    path = models / "recipe.yaml"
    path.write_text(RECIPE.format(folder=models, source=source) + more)
    (spec,) = load_merge_specs(path)
    merge(spec, models / "out")
    return models / "out"


@pytest.mark.parametrize("source", ["union", "base", "chat"])
def test_rows_and_files(models, source):
    out = run(models, source if source != "chat" else models / "chat")
    loaded = AutoTokenizer.from_pretrained(out)
    ids, size = loaded.get_vocab(), json.loads((out / "config.json").read_text())["vocab_size"]
    sources = [CheckpointSource(models / name) for name in ("base", "chat", "code")]
    known = [AutoTokenizer.from_pretrained(s.path).get_vocab() for s in sources]
    result = CheckpointSource(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors = [s.tensor(name if name in s else "model.embed_tokens.weight") for s in sources]
        rules = {
            "<zero>": (torch.zeros(16), False),
            "<old>": (tensors[2][3], False),
            "the": (tensors[1][known[1]["the"]], True),
        }
        base, chat, code = (
            vocabulary_rows(m, ids, size, known, tensors, 0, rules) for m in range(3)
        )
        merged = result.tensor(name)
        assert merged.shape == (size, 16)
        for at in ids.values():
            for got, b, x, y in zip(merged[at].tolist(), base[at], chat[at], code[at], strict=True):
                assert got == b + 0.5 * (x - b) + 0.25 * (y - b)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    eos = {"union": 1, "base": 1, "chat": 285}[source]
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == eos
    template = (out / "chat_template.jinja").read_text()
    assert template == ("{{ 'chat' }}" if source == "chat" else "{{ 'base' }}")


def test_the_chat_template_of_the_recipe_wins(models):
    out = run(models, models / "chat", "chat_template: chatml\n")
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()


def test_report_says_what_was_done(models):
    report = json.loads((run(models) / "mergeme_report.json").read_text())
    assert any("chat: lacks" in note for note in report["vocabulary"])


def test_without_a_tokenizer_entry_vocabularies_must_agree(models):
    path = models / "recipe.yaml"
    path.write_text(RECIPE.format(folder=models, source="union").split("tokenizer:")[0])
    (spec,) = load_merge_specs(path)
    with pytest.raises(CheckpointError, match="give the recipe a tokenizer"):
        merge(spec, models / "out")
