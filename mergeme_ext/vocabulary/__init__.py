"""Vocabularies of merged models: one tokenizer, and every model's rows in its order."""

from mergeme_ext.vocabulary.chat_template import CHAT_TEMPLATES, resolve_chat_template
from mergeme_ext.vocabulary.plan import TokenOf, TokenRule, VocabularyInput, plan_vocabulary
from mergeme_ext.vocabulary.rows import VocabularyRows
from mergeme_ext.vocabulary.tokenizer import ModelTokenizer, VocabularyError, read_tokenizer
from mergeme_ext.vocabulary.vocabulary import Vocabulary

__all__ = [
    "CHAT_TEMPLATES",
    "ModelTokenizer",
    "TokenOf",
    "TokenRule",
    "Vocabulary",
    "VocabularyError",
    "VocabularyInput",
    "VocabularyRows",
    "plan_vocabulary",
    "read_tokenizer",
    "resolve_chat_template",
]
