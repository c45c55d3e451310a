"""Tokenizers of unions, loaded by the libraries that users load them with."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mergeme_ext.vocabulary import TokenRule, VocabularyError, plan_vocabulary, read_tokenizer
from mergeme_ext.vocabulary.extend import unreachable
from python_tests.vocabulary.models import (
    FOX,
    KINDS,
    LOREM,
    SPHINX,
    TEXTS,
    Folder,
    added,
    byte_bpe,
    byte_fallback_bpe,
    save,
    unigram,
    word_piece,
)


def union(tmp_path, *tokenizers, tokens=None, **config):
    """Write the union of ``tokenizers``; return the plan, the folder and what loads from it."""
    inputs = [save(tmp_path / f"m{i}", t, **config) for i, t in enumerate(tokenizers)]
    vocabulary = plan_vocabulary(inputs, 0, tokens=tokens)
    vocabulary.write(Folder(tmp_path / "out"))
    return vocabulary, Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_loads_with_the_planned_ids(tmp_path, kind):
    make, size = KINDS[kind]
    second = added(make(LOREM, size), "<|im_start|>", "<|im_end|>")
    added(second, "foo bar", special=False, lstrip=True)
    vocabulary, tokenizer = union(tmp_path, make(FOX, size), second, make(SPHINX, size))
    assert tokenizer.get_vocab() == vocabulary.ids
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == vocabulary.ids
    assert len(loaded) == vocabulary.tokens
    flags = {e["content"]: e for e in json.loads(tokenizer.to_str())["added_tokens"]}
    assert flags["<|im_start|>"]["special"] and not flags["foo bar"]["special"]
    assert flags["foo bar"]["lstrip"] and not flags["<|im_start|>"]["lstrip"]
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("make", [byte_bpe, byte_fallback_bpe])
def test_every_text_comes_back(tmp_path, make):
    second = added(make(LOREM), "<|im_start|>")
    _, tokenizer = union(tmp_path, make(FOX), second, make(SPHINX))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("make", [byte_bpe, byte_fallback_bpe])
def test_new_pieces_are_used(tmp_path, make):
    vocabulary, tokenizer = union(tmp_path, make(FOX), make(LOREM), make(SPHINX))
    space = "Ġ" if make is byte_bpe else "▁"
    tokens = tokenizer.encode("a dolor of black").tokens
    assert {f"{space}{word}" for word in ("dolor", "of", "black")} < set(tokens)
    assert not any("never gives" in note for note in vocabulary.notes)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    corpora=st.lists(st.lists(st.text("abc ", max_size=9), min_size=1), min_size=2, max_size=3),
    size=st.integers(256, 275),
    text=st.text(),
)
def test_any_union_spells_any_text(tmp_path_factory, corpora, size, text):
    tokenizers = [byte_bpe(lines, size + i, ()) for i, lines in enumerate(corpora)]
    vocabulary, tokenizer = union(tmp_path_factory.mktemp("union"), *tokenizers)
    assert tokenizer.get_vocab() == vocabulary.ids
    for sample in [text, *corpora[0], *corpora[1]]:
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    base = tokenizers[0].get_vocab()
    pieces = [piece for piece in vocabulary.ids if piece not in base]
    hidden = unreachable(json.loads(tokenizer.to_str()), pieces)
    assert bool(hidden) == any("never gives" in note for note in vocabulary.notes)
    for piece in pieces:
        # Merges only join, so what the base leaves in two parts has at most two at its turn.
        if len(tokenizers[0].model.tokenize(piece)) <= 2:
            assert piece not in hidden


def test_a_piece_split_by_the_base_is_joined_again(tmp_path):
    """The base's c+k comes before the other's ac+k, so a+ck must make the word."""
    base = byte_bpe(["ck"], 257, ())
    other = byte_bpe(["ac", "ac", "ack"], 258, ())
    assert base.encode("ack").tokens == ["a", "ck"]
    assert other.encode("ack").tokens == ["ack"]
    _, tokenizer = union(tmp_path, base, other)
    assert tokenizer.encode("ack").tokens == ["ack"]


def test_words_of_the_base_alone_are_split_as_before(tmp_path):
    """Merges that make no new piece stay out, as do those of tokens that only look new."""
    base, second = byte_bpe(FOX), added(byte_bpe(FOX), "<|im_start|>")
    _, tokenizer = union(tmp_path, base, second)
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text).ids == base.encode(text).ids
    merges = json.loads(base.to_str())["model"]["merges"]
    assert json.loads(tokenizer.to_str())["model"]["merges"] == merges


def test_word_piece_prefers_the_longer_word(tmp_path):
    base, second = word_piece(FOX, 60), word_piece(LOREM, 70)
    _, tokenizer = union(tmp_path, base, second)
    encoded = tokenizer.encode("lorem the")
    assert encoded.tokens == ["[CLS]", "lorem", "the", "[SEP]"]


def test_unigram_takes_the_scores_of_the_others(tmp_path):
    base, second = unigram(FOX), unigram(LOREM)
    vocabulary, tokenizer = union(tmp_path, base, second)
    scores = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    theirs = dict(json.loads(second.to_str())["model"]["vocab"])
    ours = dict(json.loads(base.to_str())["model"]["vocab"])
    for token in vocabulary.ids:
        assert scores[token] == ours.get(token, theirs.get(token))


def test_what_special_tokens_a_model_has_are_special_in_the_result(tmp_path):
    base = byte_bpe(["ababab ab"], 258, ())
    second = added(byte_bpe(["x"], 256, ()), "ab")
    vocabulary, tokenizer = union(tmp_path, base, second)
    assert vocabulary.ids["ab"] == base.token_to_id("ab")
    assert any("now special tokens, as in another model: 'ab'" in n for n in vocabulary.notes)
    assert tokenizer.decode([vocabulary.ids["ab"]]) == ""


def test_models_that_split_words_differently(tmp_path):
    vocabulary, tokenizer = union(tmp_path, byte_bpe(FOX), unigram(LOREM))
    assert tokenizer.get_vocab() == vocabulary.ids
    notes = "\n".join(vocabulary.notes)
    assert "m1: splits words (Unigram) another way than m0" in notes
    assert "pieces of words that encoding a text never gives" in notes
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_gaps_between_ids(tmp_path):
    document = json.loads(byte_bpe().to_str())
    document["model"]["vocab"] = {
        token: at + (5 if at > 200 else 0) for token, at in document["model"]["vocab"].items()
    }
    base = Tokenizer.from_str(json.dumps(document))
    second = added(byte_bpe(LOREM), "<|im_start|>")
    for name, other in (("a", second), ("b", added(byte_bpe(), "<|im_start|>"))):
        (tmp_path / name).mkdir()
        vocabulary, tokenizer = union(tmp_path / name, base, other)
        assert tokenizer.get_vocab() == vocabulary.ids
        assert all(vocabulary.ids[t] == at for t, at in base.get_vocab().items())
        assert vocabulary.ids["<|im_start|>"] >= 295


@pytest.mark.parametrize("as_text", [True, False])
def test_merges_keep_their_notation(tmp_path, as_text):
    def noted(tokenizer):
        document = json.loads(tokenizer.to_str())
        merges = document["model"]["merges"]
        document["model"]["merges"] = [" ".join(m) for m in merges] if as_text else merges
        return document

    documents = [noted(byte_bpe(FOX)), noted(byte_bpe(LOREM))]
    inputs = []
    for i, document in enumerate(documents):
        inputs.append(save(tmp_path / f"m{i}", byte_bpe()))
        (tmp_path / f"m{i}/tokenizer.json").write_text(json.dumps(document))
    merges = plan_vocabulary(inputs, 0).document["model"]["merges"]
    count = len(documents[0]["model"]["merges"])
    assert merges[:count] == documents[0]["model"]["merges"]
    assert len(merges) > count and {type(m) for m in merges} == {str if as_text else list}


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_loads_in_the_classes_of_real_models(tmp_path, tokenizer_class):
    llama = tokenizer_class == "LlamaTokenizer"
    make = byte_fallback_bpe if llama else byte_bpe
    second = added(make(LOREM), "<|im_start|>")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    names["unk_token"] = "<unk>" if llama else "<s>"
    vocabulary, _ = union(tmp_path, make(FOX), second, tokenizer_class=tokenizer_class, **names)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = loaded.get_vocab()
    assert {t: theirs.get(t) for t in vocabulary.ids} == vocabulary.ids
    for text in TEXTS[:3]:
        ids = loaded(text, add_special_tokens=False).input_ids
        assert loaded.decode(ids).strip() == text
    assert vocabulary.ids["<|im_start|>"] in loaded("a <|im_start|>user").input_ids


def test_tokens_by_rule_are_found_in_texts(tmp_path):
    rules = {"<new>": TokenRule("zero"), "lorem": TokenRule("zero")}
    vocabulary, tokenizer = union(tmp_path, byte_bpe(), byte_bpe(), tokens=rules)
    ids = tokenizer.encode("a<new>lorem").ids
    assert ids[1:] == [vocabulary.ids["<new>"], vocabulary.ids["lorem"]]
    assert tokenizer.decode(ids) == "a<new>lorem"


def test_tokens_that_only_the_smaller_files_tell_of(tmp_path):
    decoder = {"291": {"content": "<late>", "special": True}}
    one = save(tmp_path / "a", byte_bpe(), added_tokens_decoder=decoder)
    (tmp_path / "a/added_tokens.json").write_text(json.dumps({"<early>": 290}))
    tokenizer = read_tokenizer(one.folder, "a")
    assert (tokenizer.ids["<early>"], tokenizer.ids["<late>"]) == (290, 291)
    assert tokenizer.added["<late>"]["special"]
    loaded = AutoTokenizer.from_pretrained(one.folder)
    assert loaded.get_vocab()["<late>"] == 291 or "<early>" not in loaded.get_vocab()


def test_equal_tokenizers_are_read_once(tmp_path):
    for name in "ab":
        save(tmp_path / name, byte_bpe())
    cache = {}
    one, other = (read_tokenizer(tmp_path / name, name, cache) for name in "ab")
    assert one.ids is other.ids and other.label == "b" and other.folder == tmp_path / "b"


def test_rejects_what_is_no_tokenizer(tmp_path):
    with pytest.raises(VocabularyError, match=r"x: .* has no tokenizer \(tokenizer.json\)"):
        read_tokenizer(tmp_path, "x")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Future"}}')
    with pytest.raises(VocabularyError, match=r"x: tokenizer.json cannot be used: "):
        read_tokenizer(tmp_path, "x")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(VocabularyError, match=r"tokenizer.model but no .*mergeme_ext\[hf\]"):
        read_tokenizer(tmp_path, "x")
