"""Adds tokens to a tokenizer's document, every token's id being given."""

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeme_ext.vocabulary.tokenizer import (
    FLAGS,
    ModelTokenizer,
    VocabularyError,
    load_document,
)

__all__ = ["NewToken", "extend", "shares_pieces", "unreachable"]


@dataclass(frozen=True)
class NewToken:
    """A token to add.

    Attributes:
        content: Its text.
        flags: How it is found in a text before that is split; None for a piece of words.
        score: Its logarithmic probability, if a Unigram tokenizer gave one.
    """

    content: str
    flags: Mapping[str, bool] | None = None
    score: float | None = None


def shares_pieces(one: ModelTokenizer, other: ModelTokenizer) -> bool:
    """Whether pieces of words mean the same text in both and are put together the same way."""
    if one.kind != other.kind or one.is_byte_level != other.is_byte_level:
        return False
    keys = ("continuing_subword_prefix", "end_of_word_suffix")
    models = one.document["model"], other.document["model"]
    return all((models[0].get(key) or "") == (models[1].get(key) or "") for key in keys)


def extend(
    base: ModelTokenizer,
    new: Sequence[NewToken],
    flagged: Mapping[str, Mapping[str, bool]],
    others: Iterable[ModelTokenizer],
) -> dict[str, Any]:
    """Return ``base``'s document with further tokens; no token of ``base`` changes its id.

    Pieces of words get into the vocabulary of the splitting algorithm. For BPE the merges that
    make them follow ``base``'s own merges, so a text is first split as ``base`` would and then
    joined further.

    Args:
        base: The tokenizer to extend.
        new: Tokens it does not have; they get the ids from ``base.end`` on, in this order.
        flagged: Tokens that it has as pieces of words and that become added ones, and how.
        others: Tokenizers to take merges from, in this order.

    Raises:
        VocabularyError: The library does not read the result as it is meant.
    """
    document = json.loads(json.dumps(base.document))
    ids = {**base.ids, **{token.content: base.end + i for i, token in enumerate(new)}}
    pieces = {token.content: token.score for token in new if token.flags is None}
    last = max((ids[token] for token in pieces), default=-1)
    if len(base.ids) != base.end:
        # Added tokens get the next free id by count, which is another one if ids have gaps.
        last = max(ids.values())
    if new and last >= base.end:
        _fill_model(document["model"], ids, last, pieces)
        _append_merges(document["model"], set(pieces), base, others)
    entries = {entry["content"]: entry for entry in document.get("added_tokens") or ()}
    wanted = {token.content: token.flags for token in new if token.flags is not None}
    for token, flags in {**wanted, **flagged}.items():
        flags = {flag: bool(flags.get(flag, FLAGS[flag])) for flag in FLAGS}
        entries[token] = {"id": ids[token], "content": token, **flags}
    document["added_tokens"] = sorted(entries.values(), key=lambda entry: ids[entry["content"]])
    _verify(document, ids)
    return document


def _fill_model(
    model: dict[str, Any], ids: Mapping[str, int], last: int, pieces: Mapping[str, float | None]
) -> None:
    """Put every token up to the id ``last`` into the model's vocabulary.

    The library gives tokens outside of it the ids that follow it, so none may lie between.
    """
    order = sorted((t for t in ids if ids[t] <= last), key=ids.__getitem__)
    if model["type"] != "Unigram":
        model["vocab"].update((token, ids[token]) for token in order if token not in model["vocab"])
        return
    vocab = model["vocab"]
    least = min((score for _, score in vocab), default=0.0)
    for token in order[len(vocab) :]:
        score = pieces.get(token)
        vocab.append([token, least if score is None else score])


def _append_merges(
    model: dict[str, Any],
    pieces: set[str],
    base: ModelTokenizer,
    others: Iterable[ModelTokenizer],
) -> None:
    """Append the merges that make the new ``pieces``, in the order of the others' own.

    What comes first decides how a piece is split on the way, so another's merge alone might never
    get its turn: a piece that is two parts by then gets the merge of these two as well.
    """
    if model["type"] != "BPE":
        return
    ranks = {_pair(merge): i for i, merge in enumerate(model["merges"])}
    old = len(ranks)
    vocab = model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    affixes = bool(prefix or model.get("end_of_word_suffix"))
    for other in others:
        if not shares_pieces(base, other):
            continue
        for merge in other.document["model"]["merges"]:
            left, right = pair = _pair(merge)
            piece = left + right[len(prefix) :]
            if piece not in pieces or left not in vocab or right not in vocab:
                continue
            ranks.setdefault(pair, len(ranks))
            parts = () if affixes else _split(piece, ranks)
            if len(parts) == 2:
                ranks.setdefault(tuple(parts), len(ranks))
    fresh = list(ranks)[old:]
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    if as_text and any(" " in part for pair in fresh for part in pair):
        model["merges"] = [list(_pair(merge)) for merge in model["merges"]]
        as_text = False
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in fresh]


def _split(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the pieces that the merges of these ranks make of ``word``, the lowest rank first."""
    parts = list(word)
    while len(parts) > 1:
        found = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(parts)]
        at = min(range(len(found)), key=found.__getitem__)
        if found[at] == len(ranks):
            break
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def unreachable(document: Mapping[str, Any], pieces: Collection[str]) -> list[str]:
    """Return those of ``pieces`` that encoding a text never gives: they split into others."""
    if not pieces or document["model"]["type"] not in ("BPE", "Unigram"):
        return []
    model = load_document(document, "the merged tokenizer").model
    return [piece for piece in pieces if [t.value for t in model.tokenize(piece)] != [piece]]


def _verify(document: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    loaded = load_document(document, "the merged tokenizer").get_vocab(with_added_tokens=True)
    if loaded == ids:
        return
    wrong = sorted(t for t in {*loaded, *ids} if loaded.get(t) != ids.get(t))
    token = wrong[0]
    raise VocabularyError(
        f"the merged tokenizer does not load as planned: token {token!r} should have id "
        f"{ids.get(token)} and has {loaded.get(token)}, {len(wrong)} in all; use one model's "
        "tokenizer as source instead"
    )
