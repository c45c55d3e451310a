"""The two layouts of experts' weights in a state dict: fused tensors, or one matrix per expert."""

import re
from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor, nn

__all__ = ["LAYOUTS", "fuse_experts", "keep_owned", "per_expert_tensors"]

# Names of an expert's gate, up and down matrices, as published checkpoints have them.
LAYOUTS = {
    "projections": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
}
_PARTS = {name: part for names in LAYOUTS.values() for part, name in enumerate(names)}
_KEY = re.compile(rf"(\d+)\.({'|'.join(_PARTS)})\.weight")
_FUSED = ("gate_up_proj", "down_proj")


def per_expert_tensors(
    gate_up_proj: Tensor, down_proj: Tensor, experts: Iterable[int], layout: str
) -> dict[str, Tensor]:
    """Return the matrices of each expert under the names of ``layout``.

    Args:
        gate_up_proj: [E, 2I, H], gate rows first.
        down_proj: [E, H, I].
        experts: The number each of the E experts goes by.
        layout: "projections" (``0.gate_proj.weight``, ...) or "mixtral" (``0.w1.weight``, ...).

    Returns:
        Views of the two tensors: gate [I, H], up [I, H] and down [H, I] for each expert.

    Raises:
        ValueError: ``layout`` is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"expected layout to be one of {tuple(LAYOUTS)}, got {layout!r}")
    found = {}
    for number, gate_up, down in zip(experts, gate_up_proj, down_proj, strict=True):
        for name, matrix in zip(LAYOUTS[layout], (*gate_up.chunk(2), down), strict=True):
            found[f"{number}.{name}.weight"] = matrix
    return found


def fuse_experts(
    experts: nn.Module,
    state_dict: MutableMapping[str, Tensor],
    prefix: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Replace per-expert entries of ``state_dict`` by the fused ones that ``experts`` loads.

    Entries of experts that live on another rank are dropped. What is missing keeps its present
    value and is listed in ``missing_keys``; a wrong shape is listed in ``error_msgs``; an expert
    number that the layer does not have stays, and torch reports it as unexpected.

    Args:
        experts: Has ``gate_up_proj``, ``down_proj``, ``num_experts`` E and ``owned``, the numbers
            of its experts.
        state_dict: Changed in place.
        prefix: What the keys of ``experts`` start with.
        missing_keys: As in ``torch.nn.Module.load_state_dict``.
        error_msgs: As there.
    """
    entries: dict[tuple[int, int], list[str]] = {}
    for key in state_dict:
        match = _KEY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match and int(match[1]) < experts.num_experts:
            entries.setdefault((int(match[1]), _PARTS[match[2]]), []).append(key)
    if not entries:
        return
    twice = [keys for keys in entries.values() if len(keys) > 1]
    fused = [prefix + name for name in _FUSED if prefix + name in state_dict]
    if twice or fused:
        clash = twice[0] if twice else [fused[0], next(iter(entries.values()))[0]]
        error_msgs.append(f"expected experts in one layout, got both {clash[0]} and {clash[1]}")
    layout = _layout_of(key for keys in entries.values() for key in keys)

    tensors = {place: state_dict.pop(key) for place, (key, *_) in entries.items()}
    for key in (key for keys in entries.values() for key in keys[1:]):
        del state_dict[key]
    parameters = {name: getattr(experts, name).detach() for name in _FUSED}
    half = parameters["gate_up_proj"].shape[1] // 2
    for name, parts in (("gate_up_proj", (0, 1)), ("down_proj", (2,))):
        here = {(e, part): tensors.get((e, part)) for e in experts.owned for part in parts}
        good = _checked(here, parameters[name], half, prefix, layout, missing_keys, error_msgs)
        if prefix + name in state_dict:
            continue  # an error by now
        if len({(t.dtype, t.device) for t in good.values()}) > 1:
            kinds = sorted({f"{t.dtype} on {t.device}" for t in good.values()})
            error_msgs.append(f"expected one dtype and device in {prefix}*, got {kinds}")
            good = {}
        # One more copy of one layer, for as long as it loads.
        value = parameters[name]
        if good:
            first = next(iter(good.values()))
            whole = len(good) == len(here)
            value = torch.empty_like(value, dtype=first.dtype, device=first.device)
            if not whole:
                value.copy_(parameters[name])
        for (e, part), tensor in good.items():
            row = value[e - experts.owned.start]
            (row[half:] if part == 1 else row[:half] if part == 0 else row).copy_(tensor)
        state_dict[prefix + name] = value


def keep_owned(experts: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str) -> None:
    """Cut fused entries of all experts down to those that ``experts`` owns; see fuse_experts."""
    owned = experts.owned
    for name in _FUSED:
        tensor = state_dict.get(prefix + name)
        if tensor is not None and tensor.dim() == 3 and len(tensor) == experts.num_experts:
            state_dict[prefix + name] = tensor[owned.start : owned.stop]


def _layout_of(keys: Iterable[str]) -> str:
    """The layout to name missing keys in: the one that most of ``keys`` have."""
    ends = [key.split(".")[-2] for key in keys]
    return max(LAYOUTS, key=lambda layout: sum(end in LAYOUTS[layout] for end in ends))


def _checked(
    tensors: dict[tuple[int, int], Tensor | None],
    parameter: Tensor,
    half: int,
    prefix: str,
    layout: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> dict[tuple[int, int], Tensor]:
    """Those of ``tensors`` that are there and fit, and a word on the others."""
    good = {}
    for (expert, part), tensor in tensors.items():
        key = f"{prefix}{expert}.{LAYOUTS[layout][part]}.weight"
        shape = parameter.shape[1:] if part == 2 else (half, parameter.shape[2])
        if tensor is None:
            missing_keys.append(key)
        elif tensor.shape != tuple(shape):
            error_msgs.append(f"expected {key} of shape {list(shape)}, got {list(tensor.shape)}")
        else:
            good[expert, part] = tensor
    return good
