import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mergeme_ext.vocabulary import TokenOf, TokenRule, VocabularyError, plan_vocabulary
from python_tests.references.vocabulary_rows import vocabulary_rows
from python_tests.vocabulary.models import (
    FOX,
    KINDS,
    LOREM,
    SPHINX,
    added,
    byte_bpe,
    matrices,
    save,
    stored,
)


@pytest.fixture
def three(tmp_path):
    """A base with spare rows, and two models with other words and other special tokens."""
    return [
        save(tmp_path / "base", byte_bpe(FOX), rows=296),
        save(
            tmp_path / "lorem",
            added(byte_bpe(LOREM, 285, ["<end>", "</s>"]), "<|im_start|>"),
        ),
        save(tmp_path / "sphinx", byte_bpe(SPHINX, 280, ["<s>"])),
    ]


def vocabularies(inputs):
    return [Tokenizer.from_file(str(m.folder / "tokenizer.json")).get_vocab() for m in inputs]


def assert_rows(vocabulary, inputs, tensors, base, rules=None):
    known = vocabularies(inputs)
    for m in range(len(inputs)):
        operand = vocabulary.operand(m, stored(tensors))
        assert operand.shape[0] == vocabulary.size
        expected = vocabulary_rows(m, vocabulary.ids, vocabulary.size, known, tensors, base, rules)
        out = operand.rows(0, vocabulary.size)
        for at, row in enumerate(expected):
            if row is not None:
                want = torch.tensor(row, dtype=torch.float64).to(out.dtype)
                torch.testing.assert_close(out[at], want, rtol=0, atol=0)


def test_union_keeps_the_base_and_appends_in_order(three):
    vocabulary = plan_vocabulary(three, 0)
    base, lorem, sphinx = vocabularies(three)
    assert set(vocabulary.ids) == {*base, *lorem, *sphinx}
    assert all(vocabulary.ids[token] == at for token, at in base.items())
    new = sorted((t for t in vocabulary.ids if t not in base), key=vocabulary.ids.get)
    order = [t for t in sorted(lorem, key=lorem.get) if t not in base]
    order += [t for t in sorted(sphinx, key=sphinx.get) if t not in base and t not in lorem]
    assert new == order
    assert [vocabulary.ids[t] for t in new] == list(range(len(base), len(base) + len(new)))
    assert vocabulary.tokens == len(vocabulary.ids)
    assert vocabulary.size == max(296, vocabulary.tokens)


@pytest.mark.parametrize("source", ["union", "base", 1, 2])
@pytest.mark.parametrize("base", [0, 2])
def test_rows_match_reference(three, source, base):
    vocabulary = plan_vocabulary(three, base, source=source)
    assert_rows(vocabulary, three, matrices(three), base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_averages_without_a_base(three, dtype):
    vocabulary = plan_vocabulary(three, None)
    tensors = matrices(three, dtype=dtype)
    assert_rows(vocabulary, three, tensors, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert vocabulary.operand(2, stored(tensors)).dtype == wide  # it lacks what two have


def test_rows_keep_their_dtype_unless_averaged(three):
    vocabulary = plan_vocabulary(three[:2], 0)
    tensors = matrices(three[:2], dtype=torch.bfloat16)
    assert vocabulary.operand(1, stored(tensors)).dtype == torch.bfloat16
    mixed = stored([tensors[0].float(), tensors[1]])
    assert vocabulary.operand(1, mixed).dtype == torch.float32


def test_unchanged_rows_are_the_operand_itself(tmp_path):
    models_ = [save(tmp_path / name, byte_bpe(), rows=320) for name in "ab"]
    vocabulary = plan_vocabulary(models_, 0)
    operands = stored(matrices(models_))
    assert vocabulary.size == 320
    for m in (0, 1):
        assert not vocabulary.needs_change(m)
        assert vocabulary.operand(m, operands) is operands[m]
    assert len(vocabulary.notes) == 1


@pytest.mark.parametrize("rows", [(320, 294), (294, 320), (292, 292)])
@pytest.mark.parametrize("source", ["union", "base"])
def test_spare_rows_of_the_base_stay(tmp_path, rows, source):
    """The same tokenizer over differing numbers of rows: 128256 against 128320 in small."""
    inputs = [save(tmp_path / name, byte_bpe(), rows=n) for name, n in zip("ab", rows, strict=True)]
    vocabulary = plan_vocabulary(inputs, 0, source=source)
    assert vocabulary.size == rows[0]
    assert not vocabulary.needs_change(0)
    tensors = matrices(inputs)
    out = vocabulary.operand(1, stored(tensors)).rows(0, vocabulary.size)
    common = min(rows)
    assert torch.equal(out[:common], tensors[1][:common])
    # What the second model does not have is the base's, so that it has no task vector there.
    assert torch.equal(out[common:], tensors[0][common:])
    if rows[1] > rows[0]:
        assert any("26 rows without a token left out" in note for note in vocabulary.notes)


def test_pads_with_zeros(three):
    vocabulary = plan_vocabulary(three, 0, source="base", pad_to_multiple_of=64)
    assert vocabulary.size == 320
    tensors = matrices(three)
    for m in range(3):
        rows = vocabulary.operand(m, stored(tensors)).rows(0, 320)
        assert torch.equal(rows[296:], torch.zeros(24, 3))
        assert torch.equal(rows[290:296], tensors[0][290:296])


def test_rules(three):
    tensors = matrices(three)
    ids = vocabularies(three)
    rules = {
        "<zero>": TokenRule("zero"),
        "<|im_start|>": TokenRule(1, force=True),
        "Ġ": TokenRule(2, force=True),
        "<renamed>": TokenRule(TokenOf(1, "<end>")),
        "<row>": TokenRule(TokenOf(2, token_id=7)),
        "</s>": TokenRule("zero", force=True),
        "the": TokenRule(2),
        "<s>": TokenRule(force=True),
    }
    vocabulary = plan_vocabulary(three, 0, tokens=rules)
    zero = torch.zeros(3)
    rows = {
        "<zero>": (zero, False),
        "<|im_start|>": (tensors[1][ids[1]["<|im_start|>"]], True),
        "Ġ": (tensors[2][ids[2]["Ġ"]], True),
        "<renamed>": (tensors[1][ids[1]["<end>"]], False),
        "<row>": (tensors[2][7], False),
        "</s>": (zero, True),
        "the": (tensors[2][ids[2]["the"]], False),
        "<s>": (tensors[0][ids[0]["<s>"]], True),
    }
    assert_rows(vocabulary, three, tensors, 0, rows)
    new = ["<zero>", "<renamed>", "<row>"]
    assert [vocabulary.ids[t] for t in new] == list(range(vocabulary.tokens - 3, vocabulary.tokens))


BAD = [
    ({"tokens": {"<x>": TokenRule()}}, "'<x>': no model has an embedding"),
    ({"tokens": {"<x>": TokenRule(1)}}, "'<x>': lorem has no token '<x>'"),
    ({"tokens": {"<x>": TokenRule(TokenOf(1, "nope"))}}, "lorem has no token 'nope'"),
    ({"tokens": {"<x>": TokenRule(TokenOf(0, token_id=296))}}, "one of the 296 rows.*got 296"),
    ({"tokens": {"<x>": TokenRule(7)}}, "'<x>': expected a model or zero"),
    ({"source": 3}, "expected source to be one of 3, got 3"),
    ({"source": "unoin"}, "expected source to be union, base or a model, got 'unoin'"),
    ({"pad_to_multiple_of": 0}, "expected pad_to_multiple_of to be at least 1, got 0"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_rejects_bad_input(three, arguments, message):
    with pytest.raises(VocabularyError, match=message):
        plan_vocabulary(three, 0, **arguments)


def test_rejects_what_does_not_fit(three, tmp_path):
    with pytest.raises(VocabularyError, match="there is no base model"):
        plan_vocabulary(three, None, source="base")
    with pytest.raises(VocabularyError, match="at least one model"):
        plan_vocabulary([], None)
    vocabulary = plan_vocabulary(three, 0)
    tensors = matrices(three)
    with pytest.raises(VocabularyError, match="each of 3 models, got 2"):
        vocabulary.operand(0, stored(tensors[:2]))
    with pytest.raises(VocabularyError, match=r"base: expected 296 rows.*got 295"):
        vocabulary.operand(0, stored([tensors[0][:295], *tensors[1:]]))
    with pytest.raises(VocabularyError, match="sphinx: expected"):
        vocabulary.operand(0, stored([*tensors[:2], tensors[2][1:]]))
    with pytest.raises(VocabularyError, match="lorem cannot give base the tokens it lacks"):
        vocabulary.operand(0, stored([tensors[0], tensors[1][:, :2], tensors[2]]))


def test_tokens_beyond_the_embedding_are_lacking(tmp_path):
    inputs = [
        save(tmp_path / "a", added(byte_bpe(), "<x>", "<y>"), rows=291),
        save(tmp_path / "b", added(byte_bpe(), "<x>")),
    ]
    vocabulary = plan_vocabulary(inputs, 0)
    assert vocabulary.size == vocabulary.ids["<y>"] + 1
    tensors = matrices(inputs)
    assert_rows(vocabulary, inputs, tensors, 0)
    notes = "\n".join(vocabulary.notes)
    assert "a: its embedding lacks the last" in notes
    assert "no model has a row for '<y>'" in notes


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer(tmp_path, kind):
    make, size = KINDS[kind]
    inputs = [
        save(tmp_path / "a", make(FOX, size)),
        save(tmp_path / "b", added(make(LOREM, size), "<|im_start|>")),
    ]
    for source in ("union", "base", 1):
        vocabulary = plan_vocabulary(inputs, 0, source=source)
        assert_rows(vocabulary, inputs, matrices(inputs), 0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_vocabularies(tmp_path_factory, data):
    words = [chr(ord("a") + i) * n for i in range(8) for n in (1, 2)]
    inputs = []
    for m in range(data.draw(st.integers(1, 4), label="models")):
        chosen = data.draw(st.lists(st.sampled_from(words), min_size=1, unique=True))
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(chosen)}, chosen[0]))
        spare = data.draw(st.integers(-1, 3))
        rows = max(1, len(chosen) + spare)
        inputs.append(save(tmp_path_factory.mktemp("m"), tokenizer, rows, label=f"m{m}"))
    base = data.draw(st.sampled_from([None, *range(len(inputs))]))
    sources = ["union", *range(len(inputs))] + (["base"] if base is not None else [])
    source = data.draw(st.sampled_from(sources))
    multiple = data.draw(st.sampled_from([None, 1, 4]))
    vocabulary = plan_vocabulary(inputs, base, source=source, pad_to_multiple_of=multiple)
    assert sorted(vocabulary.ids.values()) == list(range(vocabulary.tokens))
    assert vocabulary.size >= vocabulary.tokens
    assert vocabulary.size % (multiple or 1) == 0
    tensors = matrices(inputs)
    assert_rows(vocabulary, inputs, tensors, base)
    for m in range(len(inputs)):
        operand = vocabulary.operand(m, stored(tensors))
        assert (operand.stored() is None) == vocabulary.needs_change(m)
        whole = operand.rows(0, vocabulary.size)
        cut = data.draw(st.integers(0, vocabulary.size))
        halves = operand.rows(0, cut), operand.rows(cut, vocabulary.size)
        assert torch.equal(torch.cat(halves), whole)


def test_fingerprint_tells_plans_apart(three):
    first = plan_vocabulary(three, 0).fingerprint()
    assert plan_vocabulary(three, 0).fingerprint() == first
    others = [
        plan_vocabulary(three, 0, source="base"),
        plan_vocabulary(three, 1),
        plan_vocabulary(three, 0, tokens={"<s>": TokenRule("zero", force=True)}),
        plan_vocabulary(three, 0, pad_to_multiple_of=64),
    ]
    assert len({first, *(v.fingerprint() for v in others)}) == 5
