"""Decides which tokens a result has, and where each model's row of each of them comes from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergeme_ext.vocabulary.extend import NewToken, extend, shares_pieces, unreachable
from mergeme_ext.vocabulary.rows import AVERAGE, ZERO
from mergeme_ext.vocabulary.tokenizer import FLAGS, ModelTokenizer, VocabularyError, read_tokenizer
from mergeme_ext.vocabulary.vocabulary import RowPlan, Vocabulary, VocabularyInput

__all__ = ["TokenOf", "TokenRule", "VocabularyInput", "plan_vocabulary"]


@dataclass(frozen=True)
class TokenOf:
    """A token of one model, by its text there or by its id.

    Attributes:
        model: Number of the model.
        token: Its text; None if ``token_id`` says which.
        token_id: Its row in the model's embedding.
    """

    model: int
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """Where a token's row comes from, for models that lack it.

    Attributes:
        source: Number of a model that has it, a token of a model, ``zero``, or None for what would
            be done anyway.
        force: Use that row for the models that have the token, too.
    """

    source: "int | TokenOf | Literal['zero'] | None" = None
    force: bool = False


def plan_vocabulary(
    models: Sequence[VocabularyInput],
    base: int | None,
    *,
    source: "int | Literal['union', 'base']" = "union",
    tokens: Mapping[str, TokenRule] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:
    """Return the vocabulary that a merge of ``models`` gets.

    With ``union`` the base's tokens (without a base, the first model's) keep their ids and the
    others' follow, model by model in the order of their ids there. Tokens with a rule that are not
    in the vocabulary come last.

    A model's row for a token is its own, if it has one. Else it is that of the rule, if the token
    has one; else the base's; else the mean over all models that have the token.

    Rows without a token, which checkpoints have so that their number is round, stay: the result
    has at least as many rows as the model whose tokenizer is kept or extended.

    Args:
        models: All that take part, in order.
        base: Number of the base among them.
        source: Whose tokens the result has: all models', the base's, or those of one by number.
        tokens: Rules for single tokens.
        pad_to_multiple_of: Round the number of rows up to a multiple of this.

    Raises:
        VocabularyError: A tokenizer cannot be read or extended, or a rule asks for a row that is
            not there.
    """
    tokens = dict(tokens or {})
    _check(models, base, source, pad_to_multiple_of)
    cache: dict[str, ModelTokenizer] = {}
    tokenizers = [read_tokenizer(model.folder, model.label, cache) for model in models]
    lead = 0 if base is None else base
    kept = source if isinstance(source, int) else lead
    planner = _Planner(models, base, tokenizers, kept)
    new, flagged = planner.new_tokens(union=source == "union", rules=tokens)
    document = None
    if new or flagged:
        others = [t for i, t in enumerate(tokenizers) if i != kept]
        document = extend(tokenizers[kept], new, flagged, others)
    ids = dict(tokenizers[kept].ids)
    ids.update((token.content, tokenizers[kept].end + i) for i, token in enumerate(new))
    size = max(models[kept].rows, max(ids.values(), default=-1) + 1)
    if pad_to_multiple_of is not None:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    plans = planner.rows(ids, size, tokens)
    vocabulary = Vocabulary(
        size=size,
        ids=ids,
        notes=[],
        inputs=tuple(models),
        tokenizers=tokenizers,
        lead=lead,
        kept=kept,
        document=document,
        plans=plans,
    )
    vocabulary.notes.extend(_describe(vocabulary, new, flagged, planner.rowless))
    return vocabulary


def _check(
    models: Sequence[VocabularyInput],
    base: int | None,
    source: "int | str",
    pad_to_multiple_of: int | None,
) -> None:
    if not models:
        raise VocabularyError("expected at least one model")
    for model in models:
        if model.rows < 1:
            raise VocabularyError(
                f"{model.label}: found no embedding; vocabularies can only be merged with one"
            )
    for what, number in (("base", base), ("source", source)):
        if isinstance(number, int) and not 0 <= number < len(models):
            raise VocabularyError(f"expected {what} to be one of {len(models)}, got {number}")
    if isinstance(source, str) and source not in ("union", "base"):
        raise VocabularyError(f"expected source to be union, base or a model, got {source!r}")
    if source == "base" and base is None:
        raise VocabularyError("the tokenizer is to be the base's, but there is no base model")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise VocabularyError(
            f"expected pad_to_multiple_of to be at least 1, got {pad_to_multiple_of}"
        )


class _Planner:
    """The models of one plan; see ``plan_vocabulary`` for what is decided."""

    def __init__(
        self,
        models: Sequence[VocabularyInput],
        base: int | None,
        tokenizers: Sequence[ModelTokenizer],
        kept: int,
    ):
        self.models, self.base, self.tokenizers, self.kept = models, base, tokenizers, kept
        # Tokens for which no model has a row.
        self.rowless: list[str] = []

    # Tokens

    def new_tokens(
        self, *, union: bool, rules: Mapping[str, TokenRule]
    ) -> tuple[list[NewToken], dict[str, Mapping[str, bool]]]:
        """Return the tokens to add, and those to turn from pieces of words into special ones."""
        kept = self.tokenizers[self.kept]
        new: dict[str, NewToken] = {}
        flagged: dict[str, Mapping[str, bool]] = {}
        seen = {id(kept.ids)}
        for other in self.tokenizers if union else ():
            if id(other.ids) in seen:
                continue
            seen.add(id(other.ids))
            scores = _scores(other)
            for token in other.by_id():
                flags = other.added.get(token)
                if token not in kept.ids:
                    if token not in new or (flags and flags["special"] and not new[token].flags):
                        new[token] = NewToken(token, flags, scores.get(token))
                elif flags and flags["special"] and token not in kept.added:
                    flagged.setdefault(token, flags)
        for token, rule in rules.items():
            if token not in kept.ids and token not in new:
                new[token] = NewToken(token, self._flags_for(token, rule))
        return list(new.values()), flagged

    def _flags_for(self, token: str, rule: TokenRule) -> Mapping[str, bool]:
        first = rule.source.model if isinstance(rule.source, TokenOf) else rule.source
        order = [first] if isinstance(first, int) and 0 <= first < len(self.models) else []
        for number in [*order, *range(len(self.models))]:
            if token in self.tokenizers[number].added:
                return self.tokenizers[number].added[token]
        return FLAGS

    # Rows

    def rows(
        self, ids: Mapping[str, int], size: int, rules: Mapping[str, TokenRule]
    ) -> list[RowPlan]:
        """Return where every model's rows come from."""
        own = [self._own(number, ids, size) for number in range(len(self.models))]
        fill_model, fill_index = self._fill(ids, size, own)
        forced = torch.zeros(size, dtype=torch.bool)
        for token, rule in rules.items():
            at = ids[token]
            forced[at] = rule.force
            if rule.source is not None:
                fill_model[at], fill_index[at] = self._ruled(token, rule.source)
        self._find_rowless(ids, fill_model, rules)
        plans = []
        everything = torch.arange(size)
        for number, rows in enumerate(own):
            has = (rows >= 0) & ~forced
            model = torch.where(has, number, fill_model)
            index = torch.where(has, rows, fill_index)
            if self._keeps_ids(number, ids):
                # Nothing moves, so rows without a token still correspond.
                spare = self._spare(ids, size) & (everything < self.models[number].rows)
                model[spare] = number
                index[spare] = everything[spare]
            unchanged = (
                size == self.models[number].rows
                and bool((model == number).all())
                and torch.equal(index, everything)
            )
            plans.append(RowPlan(model, index, rows, unchanged))
        return plans

    def _own(self, number: int, ids: Mapping[str, int], size: int) -> Tensor:
        """Return int64 ``[size]``: the model's row for each token, or -1."""
        out = torch.full((size,), -1, dtype=torch.int64)
        limit = self.models[number].rows
        theirs = self.tokenizers[number].ids
        pairs = [(ids[t], row) for t, row in theirs.items() if t in ids and row < limit]
        if pairs:
            places = torch.tensor(pairs, dtype=torch.int64)
            out[places[:, 0]] = places[:, 1]
        return out

    def _fill(
        self, ids: Mapping[str, int], size: int, own: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return where rows come from for models that have none of their own."""
        model = torch.full((size,), ZERO, dtype=torch.int32)
        index = torch.zeros(size, dtype=torch.int64)
        count = torch.zeros(size, dtype=torch.int64)
        for number, rows in enumerate(own):
            has = rows >= 0
            count += has
            model[has] = number
            index[has] = rows[has]
        model[count > 1] = AVERAGE
        spare = self._spare(ids, size) & (torch.arange(size) < self.models[self.kept].rows)
        model[spare] = self.kept
        index[spare] = spare.nonzero().flatten()
        if self.base is not None:
            has = own[self.base] >= 0
            model[has] = self.base
            index[has] = own[self.base][has]
        return model, index

    def _ruled(self, token: str, source: "int | TokenOf | str") -> tuple[int, int]:
        if source == "zero":
            return ZERO, 0
        if isinstance(source, int):
            source = TokenOf(source, token)
        if not isinstance(source, TokenOf) or not 0 <= source.model < len(self.models):
            raise VocabularyError(f"token {token!r}: expected a model or zero, got {source!r}")
        model = self.models[source.model]
        row = source.token_id
        if source.token is not None:
            row = self.tokenizers[source.model].ids.get(source.token)
            if row is None:
                raise VocabularyError(
                    f"token {token!r}: {model.label} has no token {source.token!r}"
                )
        if row is None or not 0 <= row < model.rows:
            raise VocabularyError(
                f"token {token!r}: expected one of the {model.rows} rows of {model.label}, "
                f"got {row}"
            )
        return source.model, row

    def _find_rowless(
        self, ids: Mapping[str, int], fill_model: Tensor, rules: Mapping[str, TokenRule]
    ) -> None:
        zeros = set((fill_model == ZERO).nonzero().flatten().tolist())
        for token, at in ids.items():
            if at not in zeros:
                continue
            if token not in rules:
                self.rowless.append(token)
            elif rules[token].source is None:
                raise VocabularyError(
                    f"token {token!r}: no model has an embedding for it; give it a source"
                )

    def _keeps_ids(self, number: int, ids: Mapping[str, int]) -> bool:
        return all(ids.get(token) == row for token, row in self.tokenizers[number].ids.items())

    @staticmethod
    def _spare(ids: Mapping[str, int], size: int) -> Tensor:
        """Return bool ``[size]``: whether a row has no token."""
        out = torch.ones(size, dtype=torch.bool)
        out[torch.tensor(list(ids.values()), dtype=torch.int64)] = False
        return out


def _scores(tokenizer: ModelTokenizer) -> dict[str, float]:
    return dict(tokenizer.document["model"]["vocab"]) if tokenizer.kind == "Unigram" else {}


# Notes


def _describe(
    vocabulary: Vocabulary,
    new: Sequence[NewToken],
    flagged: Mapping[str, Mapping[str, bool]],
    rowless: Sequence[str],
) -> Iterator[str]:
    models, kept = vocabulary.inputs, vocabulary.kept
    verb = f"with {len(new)} more" if new else "kept as it is"
    yield (
        f"vocabulary: {vocabulary.size} rows for {vocabulary.tokens} tokens; the tokenizer of "
        f"{models[kept].label}, {verb}"
    )
    if vocabulary.size != models[kept].rows:
        yield f"{models[kept].label} had {models[kept].rows} rows"
    if flagged:
        yield f"now special tokens, as in another model: {_some(flagged)}"
    if rowless:
        yield f"no model has a row for {_some(rowless)}: they get zeros"
    for number, model in enumerate(models):
        yield from _describe_model(vocabulary, number, model)
    if vocabulary.document is not None:
        yield from _describe_pieces(vocabulary, new)
    before = models[vocabulary.lead].config
    after = vocabulary.config_changes(before)
    for key in sorted({*before, *after} - {"vocab_size", "text_config"}):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)} becomes {after.get(key)}"


def _describe_model(vocabulary: Vocabulary, number: int, model: VocabularyInput) -> Iterator[str]:
    tokenizer, plan = vocabulary.tokenizers[number], vocabulary.plans[number]
    if (gone := tokenizer.end - model.rows) > 0:
        yield f"{model.label}: its embedding lacks the last {gone} ids of its tokenizer"
    if plan.unchanged:
        return
    lacking = vocabulary.tokens - int((plan.own >= 0).sum())
    if lacking:
        yield f"{model.label}: lacks {lacking} of the tokens; they are filled in"
    if left := [token for token in tokenizer.ids if token not in vocabulary.ids]:
        yield f"{model.label}: {_some(left)} not in the result"
    read = plan.index[plan.model == number]
    spare = model.rows - len(set(tokenizer.ids.values()) & set(range(model.rows)))
    used = int((~torch.isin(read, torch.tensor([*tokenizer.ids.values()]))).sum())
    if spare > used:
        yield f"{model.label}: {spare - used} rows without a token left out"


def _describe_pieces(vocabulary: Vocabulary, new: Sequence[NewToken]) -> Iterator[str]:
    kept = vocabulary.tokenizers[vocabulary.kept]
    pieces = {token.content for token in new if token.flags is None}
    for number, tokenizer in enumerate(vocabulary.tokenizers):
        if not pieces.isdisjoint(tokenizer.ids) and not shares_pieces(kept, tokenizer):
            yield (
                f"{vocabulary.inputs[number].label}: splits words ({tokenizer.kind}"
                f"{', bytes' if tokenizer.is_byte_level else ''}) another way than "
                f"{kept.label}"
            )
    if hidden := unreachable(vocabulary.document, pieces):
        yield f"pieces of words that encoding a text never gives: {_some(sorted(hidden))}"


def _some(tokens: Sequence[str] | Mapping[str, object]) -> str:
    tokens = list(tokens)
    shown = ", ".join(repr(token) for token in tokens[:3])
    return shown if len(tokens) <= 3 else f"{len(tokens)} tokens ({shown}, ...)"
