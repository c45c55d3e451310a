"""Reads what recipes say of the vocabulary: whose it is, and where tokens' embeddings come from."""

from mergeme_ext.merging.references import ModelReader
from mergeme_ext.merging.spec import ModelRef, ModelToken, TokenizerSpec, TokenRule
from mergeme_ext.recipes import Section

__all__ = ["read_tokenizer"]

# Older recipes have it before the model whose tokenizer is to be used.
_MODEL_PREFIX = "model:"


def read_tokenizer(recipe: Section, models: ModelReader) -> TokenizerSpec | None:
    """Return what is under ``tokenizer``, or under the older ``tokenizer_source``; None if neither.

    Raises:
        RecipeError: Both are there, or something unknown is asked for.
    """
    if "tokenizer" not in recipe:
        if "tokenizer_source" not in recipe:
            return None
        return TokenizerSpec(_source(models, recipe, "tokenizer_source"))
    if "tokenizer_source" in recipe:
        raise recipe.error(
            "tokenizer_source is the old form of tokenizer; give one of them",
            "tokenizer_source",
        )
    section = recipe.section("tokenizer")
    section.allow_only(("source", "tokens", "pad_to_multiple_of"))
    source = _source(models, section, "source") if "source" in section else "union"
    tokens = section.section("tokens")
    rules = {}
    if tokens is not None:
        rules = {token: _rule(models, tokens.section(token)) for token in tokens.keys}
    return TokenizerSpec(source, rules, section.integer("pad_to_multiple_of", None, low=1))


def _source(models: ModelReader, section: Section, key: str) -> ModelRef | str:
    if section.value(key) in ("union", "base"):
        return section.text(key)
    if not section.holds_mapping(key) and section.text(key).startswith(_MODEL_PREFIX):
        return models.of_text(section, key, section.text(key).removeprefix(_MODEL_PREFIX))
    return models.read(section, key)


def _rule(models: ModelReader, section: Section) -> TokenRule:
    section.allow_only(("source", "force"))
    force = section.boolean("force", False)
    if section.value("source", None) is None:
        return TokenRule(None, force)
    if section.holds_mapping("source"):
        entry = section.section("source")
        if "kind" in entry:
            return TokenRule(_token(models, entry), force)
    return TokenRule(models.read(section, "source"), force)


def _token(models: ModelReader, entry: Section) -> ModelToken | str:
    if entry.text("kind", choices=("zero", "model_token")) == "zero":
        entry.allow_only(("kind",))
        return "zero"
    entry.allow_only(("kind", "model", "token", "token_id"))
    model = models.read(entry, "model")
    if ("token" in entry) == ("token_id" in entry):
        raise entry.error(f"expected {entry.where} to have either token or token_id")
    return ModelToken(model, entry.text("token", None), entry.integer("token_id", None, low=0))
