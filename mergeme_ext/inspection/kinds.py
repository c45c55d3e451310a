"""Which kind of module a tensor belongs to, and in which layer it is."""

import re

from mergeme_ext.io.names import Part, PartKind, part_of

__all__ = ["kind_of", "kind_order", "layer_of"]

_ATTENTION = [f"attention {role}" for role in "qkvo"]
_MLP = [f"mlp {role}" for role in ("gate", "up", "down")]
_NORMS = ["norm input", "norm post_attention", "norm final"]
_KNOWN = ["embedding", *_ATTENTION, *_MLP, *_NORMS, "head"]
_NUMBER = re.compile(r"\d+")


def _known_kind(part: Part) -> str:
    if part.kind in (PartKind.EMBEDDING, PartKind.HEAD):
        return part.kind.value
    group = "mlp" if part.kind is PartKind.FFN else part.kind.value
    return f"{group} {part.role}" + (" bias" if part.bias else "")


def _first_number(name: str) -> int | None:
    """Return where in the dotted ``name`` the first component is a number."""
    return next((i for i, p in enumerate(name.split(".")) if _NUMBER.fullmatch(p)), None)


def layer_of(name: str) -> int | None:
    """Return the layer of tensor ``name``: the first number in it; None outside the layers."""
    place = _first_number(name)
    return None if place is None else int(name.split(".")[place])


def kind_of(name: str) -> str:
    """Return the module kind of tensor ``name``.

    LLaMA's and Mistral's tensors have kinds such as ``attention q`` and ``mlp down``. Every other
    tensor is grouped by its own name: what follows the layer's number, further numbers (an
    expert's) replaced by a star and ``.weight`` dropped: ``mlp.experts.*.down_proj``.
    """
    if (part := part_of(name)) is not None:
        return _known_kind(part)
    place = _first_number(name)
    components = name.split(".")
    suffix = components if place is None else components[place + 1 :]
    if len(suffix) > 1 and suffix[-1] == "weight":
        suffix = suffix[:-1]
    return ".".join("*" if _NUMBER.fullmatch(c) else c for c in suffix) or name


def kind_order(kinds: list[str]) -> list[str]:
    """Return ``kinds`` once each: known ones from embedding to head, then others as they come."""
    once = list(dict.fromkeys(kinds))
    return [k for k in _KNOWN if k in once] + [k for k in once if k not in _KNOWN]
