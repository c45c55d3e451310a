"""Which tensor plays which part, per architecture; the only place that holds such names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = [
    "EMBEDDING",
    "HEAD",
    "LAYER_WORDS",
    "MODULES",
    "Part",
    "PartKind",
    "VocabularyNames",
    "dense_shapes",
    "expert_storage",
    "ffn_name",
    "is_before_layers",
    "is_rotary_table",
    "mixtral_expert_name",
    "mixtral_router_name",
    "module_of",
    "part_of",
    "supported",
    "vocabulary_names",
]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Decoders whose tensors are named as below; Mistral differs from LLaMA only in its config.
MODEL_TYPES = ("llama", "mistral")


# Parts of models that recipes may merge each in its own way, and how their tensors' names begin.
MODULES = {
    "text_decoder": (
        "language_model.",
        "model.language_model.",
        "model.layers.",
        "model.embed_tokens.",
        "model.norm.",
        "lm_head.",
    ),
    "vision_tower": (
        "vision_tower.",
        "model.vision_tower.",
        "vision_model.",
        "model.vision_model.",
        "visual.",
        "model.visual.",
    ),
    "multi_modal_projector": (
        "multi_modal_projector.",
        "model.multi_modal_projector.",
        "mm_projector.",
        "model.mm_projector.",
        "connector.",
        "model.connector.",
        "visual.merger.",
        "model.visual.merger.",
    ),
    "audio_tower": ("audio_tower.", "model.audio_tower."),
    "encoder": ("encoder.", "model.encoder."),
    "decoder": ("decoder.", "model.decoder."),
}
# What stacks of layers are called: the word before the layer's number.
LAYER_WORDS = ("layers", "layer", "h", "block", "blocks", "resblocks", "encoder_layers")
_BEFORE_LAYERS = re.compile(
    r"(^|\.)(embed|embedding|embeddings|embed_tokens\w*|embed_in|embed_positions|emb_norm|shared|"
    r"tok_embeddings|token_embd|wte|wpe|word_embeddings\w*)\."
)
_EXPERT = re.compile(r"\.experts\.(\d+\.)?")
_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|wte|tok_embeddings|embed_in)\.weight|transformer\.word_embeddings\.weight"
)
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight|output\.weight")
# Of layers that predict further tokens.
_FURTHER = re.compile(r".*\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
# Has a row for each token too, but of other tokens than the embedding.
_EMBEDDING_PER_LAYER = re.compile(r"(.*\.)?embed_tokens_per_layer\.weight")
_ROTARY_TABLE = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def module_of(name: str, modules: Iterable[str] = MODULES) -> str | None:
    """Return which of ``modules`` tensor ``name`` belongs to; None if to none of them."""
    fitting = [
        (len(start), module)
        for module in modules
        for start in MODULES.get(module, ())
        if name.startswith(start)
    ]
    return max(fitting)[1] if fitting else None


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers is used before them, as embeddings are."""
    return _BEFORE_LAYERS.search(name) is not None


def is_rotary_table(name: str) -> bool:
    """Whether ``name`` is a table that the configuration determines; old files hold them."""
    return _ROTARY_TABLE.search(name) is not None


@dataclass(frozen=True)
class VocabularyNames:
    """The tensors of a model that have a row for each token.

    Attributes:
        embedding: None if there is none, or no telling which.
        head: None if none is stored.
        others: A bias of the head, embeddings and heads of layers that predict further tokens.
    """

    embedding: str | None
    head: str | None
    others: frozenset[str]

    @property
    def every(self) -> frozenset[str]:
        """All of them."""
        return self.others | {name for name in (self.embedding, self.head) if name is not None}


def vocabulary_names(names: Iterable[str]) -> VocabularyNames:
    """Return which of a model's tensors ``names`` have a row for each token."""
    names = set(names)
    further = {name for name in names if _FURTHER.fullmatch(name)}
    embedding = _only_one(EMBEDDING, (n for n in names - further if _EMBEDDING.fullmatch(n)))
    if embedding is None or any(map(_EMBEDDING_PER_LAYER.fullmatch, names)):
        return VocabularyNames(None, None, frozenset())
    head = _only_one(HEAD, (n for n in names if _HEAD.fullmatch(n)))
    bias = {f"{head.removesuffix('.weight')}.bias"} if head is not None else set()
    return VocabularyNames(embedding, head, frozenset(further | (bias & names)))


def _only_one(usual: str, found: Iterable[str]) -> str | None:
    found = set(found)
    return usual if usual in found else found.pop() if len(found) == 1 else None


def expert_storage(names: Iterable[str]) -> str | None:
    """Return how a model with tensors ``names`` stores experts; None if it has none, or both ways.

    ``one by one`` means a tensor for each expert, ``fused`` one for all experts of a layer.
    """
    ways = {"one by one" if m[1] else "fused" for m in map(_EXPERT.search, names) if m}
    return ways.pop() if len(ways) == 1 else None


class PartKind(Enum):
    """What a tensor of a decoder is for."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    FFN = "ffn"
    NORM = "norm"
    HEAD = "head"
    BUFFER = "buffer"


@dataclass(frozen=True)
class Part:
    """One tensor's part: its kind, its layer (None outside the stack), its role in there.

    Roles: ``q``, ``k``, ``v``, ``o`` of attention; ``gate``, ``up``, ``down`` of an FFN; ``input``,
    ``post_attention``, ``final`` of norms; ``embedding``, ``head``, ``inv_freq`` of the rest.
    ``bias`` tells a bias from a weight.
    """

    kind: PartKind
    layer: int | None
    role: str
    bias: bool = False


_LAYER = r"model\.layers\.(\d+)\."
_PATTERNS = [
    (re.compile(_LAYER + r"self_attn\.([qkvo])_proj\.(weight|bias)"), PartKind.ATTENTION),
    (re.compile(_LAYER + r"mlp\.(gate|up|down)_proj\.(weight|bias)"), PartKind.FFN),
    (re.compile(_LAYER + r"(input|post_attention)_layernorm\.(weight)"), PartKind.NORM),
    (re.compile(_LAYER + r"self_attn\.rotary_emb\.(inv_freq)()"), PartKind.BUFFER),
]
_OUTSIDE = {
    EMBEDDING: Part(PartKind.EMBEDDING, None, "embedding"),
    HEAD: Part(PartKind.HEAD, None, "head"),
    "model.norm.weight": Part(PartKind.NORM, None, "final"),
}
_MIXTRAL_ROLES = {"gate": "w1", "down": "w2", "up": "w3"}


def supported(config: Mapping[str, Any]) -> bool:
    """Whether ``part_of`` knows the tensor names of models with this ``config.json``."""
    return config.get("model_type") in MODEL_TYPES


def part_of(name: str) -> Part | None:
    """Return the part that tensor ``name`` plays in a LLaMA or Mistral decoder; None if none."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    for pattern, kind in _PATTERNS:
        if match := pattern.fullmatch(name):
            return Part(kind, int(match[1]), match[2], match[3] == "bias")
    return None


def ffn_name(layer: int, role: str) -> str:
    """Return the name of an FFN weight, ``role`` being ``gate``, ``up`` or ``down``."""
    return f"model.layers.{layer}.mlp.{role}_proj.weight"


def mixtral_router_name(layer: int) -> str:
    """Return the name of a Mixtral layer's router weight ``[E, H]``, as it is on disk."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def mixtral_expert_name(layer: int, expert: int, role: str) -> str:
    """Return the name of an expert's weight on disk; ``role`` is ``gate``, ``up`` or ``down``."""
    kind = _MIXTRAL_ROLES[role]
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{kind}.weight"


def dense_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight of a LLaMA or Mistral model, embedding first.

    Args:
        config: ``config.json`` with no size left to a default; without biases.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            ffn_name(layer, "gate"): (inner, hidden),
            ffn_name(layer, "up"): (inner, hidden),
            ffn_name(layer, "down"): (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (config["vocab_size"], hidden)
    return shapes
