import json

import pytest
from transformers import AutoTokenizer

from mergeme_ext.io import CheckpointSink
from mergeme_ext.vocabulary import TokenRule, plan_vocabulary
from python_tests.vocabulary.models import FOX, LOREM, Folder, added, byte_bpe, save


@pytest.fixture
def two(tmp_path):
    base = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    chat = {"bos_token_id": None, "eos_token_id": [0, 285], "pad_token_id": 0}
    other = added(byte_bpe(LOREM, 285, ["<end>", "</s>"]), "<|im_end|>")
    return [
        save(tmp_path / "base", byte_bpe(FOX), rows=320, config=base),
        save(tmp_path / "chat", other, config=chat),
    ]


@pytest.mark.parametrize("source", ["base", 1])
def test_a_kept_tokenizer_is_copied_byte_for_byte(two, tmp_path, source):
    folder = two[source if isinstance(source, int) else 0].folder
    (folder / "special_tokens_map.json").write_text('{ "eos_token":   "</s>"}')
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    names += ["tokenizer.model"]
    vocabulary = plan_vocabulary(two, 0, source=source)
    sink = CheckpointSink(tmp_path / "out", [])
    with sink:
        done = vocabulary.write(sink)
    assert set(names) <= set(done) and "chat_template.jinja" not in done
    assert {p.name for p in (tmp_path / "out").iterdir()} - {"model.safetensors"} == set(names)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_the_chat_template_comes_along_when_asked_for(two, tmp_path):
    (two[1].folder / "chat_template.jinja").write_text("{{ messages }}")
    out = Folder(tmp_path / "out")
    done = plan_vocabulary(two, 0, source=1).write(out, chat_template=True)
    assert (out.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {"chat_template.jinja", "chat_template.json"} <= set(done)


def test_an_extended_tokenizer_leaves_nothing_stale(two, tmp_path):
    folder = two[0].folder
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).write_text("{}")
    out = Folder(tmp_path / "out")
    vocabulary = plan_vocabulary(two, 0, tokens={"<new>": TokenRule("zero")})
    done = vocabulary.write(out)
    written = {p.name for p in out.path.iterdir()}
    assert not {"vocab.json", "merges.txt", "tokenizer.model"} & written
    assert {"vocab.json", "merges.txt", "tokenizer.model"} <= set(done)
    ids = vocabulary.ids
    fresh = {t: ids[t] for t in ("<end>", "<|im_end|>", "<new>")}
    assert json.loads((out.path / "added_tokens.json").read_text()) == fresh
    decoder = json.loads((out.path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {e["content"]: int(i) for i, e in decoder.items()} == {
        **fresh,
        "<s>": 0,
        "</s>": 1,
    }
    assert AutoTokenizer.from_pretrained(out.path).get_vocab() == ids


def test_config_of_a_union(two):
    vocabulary = plan_vocabulary(two, 0)
    config = two[0].config
    assert vocabulary.config_changes(config) == {**config, "vocab_size": vocabulary.size}
    nested = {"model_type": "x", "text_config": {"vocab_size": 3}}
    changed = vocabulary.config_changes(nested)
    assert changed["text_config"]["vocab_size"] == vocabulary.size
    assert nested["text_config"]["vocab_size"] == 3


def test_config_when_another_models_tokenizer_is_taken(two):
    vocabulary = plan_vocabulary(two, 0, source=1)
    changed = vocabulary.config_changes(two[0].config)
    # bos is null in the other: the lead's <s> is gone. eos and pad are the other's.
    assert changed["bos_token_id"] is None
    assert changed["eos_token_id"] == [0, 285] and changed["pad_token_id"] == 0
    assert changed["vocab_size"] == two[1].rows
    generation = {"eos_token_id": [1, 0], "forced_bos_token_id": 1, "temperature": 0.6}
    assert vocabulary.config_changes(generation) == {
        "eos_token_id": [0, 285],
        "pad_token_id": 0,
        "forced_bos_token_id": 1,  # </s> has the same id there
        "temperature": 0.6,
    }
    (two[1].folder / "generation_config.json").write_text('{"eos_token_id": 285}')
    assert vocabulary.config_changes(generation)["eos_token_id"] == 285
    assert "bos_token_id: 0 becomes None" in vocabulary.notes


def test_ids_follow_their_tokens(two, tmp_path):
    """The other model says nothing about special tokens: the lead's move with their texts."""
    silent = save(tmp_path / "silent", byte_bpe(LOREM, 285, ["<end>", "<pad>", "</s>"]))
    vocabulary = plan_vocabulary([two[0], silent], 0, source=1)
    changed = vocabulary.config_changes({**two[0].config, "suppress_tokens": [0, 1]})
    assert changed["eos_token_id"] == 2 and changed["suppress_tokens"] == [2]


def test_ids_of_tokens_that_only_the_tokenizer_names(two, tmp_path):
    names = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<end>"}
    chat = save(tmp_path / "named", added(byte_bpe(LOREM, 285, ["<end>"]), "<|im_end|>"), **names)
    vocabulary = plan_vocabulary([two[0], chat], 0, source=1)
    changed = vocabulary.config_changes(two[0].config)
    assert changed["eos_token_id"] == vocabulary.ids["<|im_end|>"]
    assert changed["pad_token_id"] == 0
