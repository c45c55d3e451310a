import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.demo import corpora
from mergeme_ext.demo.corpora import corpus_from_file, pack, passages, split


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_pack_puts_a_separator_after_each_text():
    rows = pack(Letters(), ["abc", "de", "fghi"], rows=9, length=4, separator=0)
    assert rows.tolist() == [[97, 98, 99, 0], [100, 101, 0, 102], [103, 104, 105, 0]]


def test_pack_takes_no_more_than_asked():
    rows = pack(Letters(), ["abcdefgh"] * 100, rows=2, length=5, separator=0)
    assert rows.shape == (2, 5) and rows.dtype == torch.int64


def test_pack_refuses_too_little_text():
    with pytest.raises(ValueError, match="at least 10 tokens, got 4"):
        pack(Letters(), ["abc"], rows=1, length=10, separator=0)
    with pytest.raises(ValueError, match="at least 1 tokens, got 0"):
        pack(Letters(), [], rows=1, length=1, separator=0)


@given(st.text(alphabet="ab\n é", max_size=9000))
def test_passages_lose_nothing(text):
    parts = list(passages(text))
    assert "".join(parts) == text
    for part in parts:
        lines = part.splitlines(keepends=True)
        assert len(part) <= corpora.PASSAGE_CHARACTERS or len(lines) == 1


@given(st.lists(st.text(min_size=1), min_size=2, max_size=60, unique=True), st.randoms())
def test_split_is_disjoint_and_blind_to_order(documents, random):
    train, held_out = split(documents, "x")
    shuffled = list(documents)
    random.shuffle(shuffled)
    assert split(shuffled, "x") == (train, held_out)
    assert train and held_out and not set(train) & set(held_out)


def test_split_holds_out_one_in_twenty():
    documents = [f"document {i}" for i in range(200)]
    train, held_out = split(documents, "x")
    assert len(held_out) == 10 and len(train) == 190
    with pytest.raises(ValueError, match="x: expected at least two different documents, got 1"):
        split(["same", "same"], "x")


def test_file_of_paragraphs_and_jsonl(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("one\nstill one\n\ntwo\n\n\n\nthree\n")
    text = corpus_from_file(plain)
    assert sorted(text.train + text.held_out) == ["one\nstill one", "three", "two"]
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t}) for t in ("x\n\ny", "z")))
    text = corpus_from_file(lines)
    assert sorted(text.train + text.held_out) == ["x\n\ny", "z"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"txt": "b"}', 'line 2: expected an object with a string "text"'),
        ("nonsense", "line 1: expected an object"),
        ('["text"]', "line 1: expected an object"),
    ],
)
def test_bad_jsonl_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "b.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        corpus_from_file(file)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="expected a readable text file"):
        corpus_from_file(tmp_path / "none.txt")


def test_corpus_is_cached(tmp_path, monkeypatch):
    calls = []

    def documents(packages):
        calls.append(packages)
        return (f"text {i}" for i in range(40))

    monkeypatch.setitem(corpora.DOMAINS, "medicine", (documents, "somewhere"))
    first = corpora.corpus("medicine", tmp_path)
    assert corpora.corpus("medicine", tmp_path) == first
    assert calls == [tmp_path / "packages"] and first.source == "somewhere"
    assert [p.suffix for p in (tmp_path / "texts").iterdir()] == [".json"]


def test_code_needs_no_package(tmp_path):
    text = corpora.corpus("code", tmp_path)
    assert sum(map(len, text.train)) > 1_000_000 and len(text.held_out) > 20
