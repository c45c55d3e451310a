"""Packed weights in the place of a module's parameters, and back."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergeme_ext.moe.packed import PACKABLE
from mergeme_ext.ops import pack_experts, unpack_experts

__all__ = [
    "PackedWeights",
    "check_packable",
    "pack_parameters",
    "packed_weights",
    "unpack_parameters",
]

_ATTRIBUTE = "_mergeme_packed"


@dataclass
class PackedWeights:
    """The packed weights of one module, by the parameters' names.

    Not buffers: ``module.half()`` would convert a packed layout element by element, though packing
    depends on the dtype. So they keep their dtype whatever the rest of the model is cast to.
    """

    packed: dict[str, Tensor]
    options: dict[str, dict[str, bool]]
    dtype: torch.dtype
    requires_grad: dict[str, bool]
    shapes: dict[str, torch.Size]

    def original(self, name: str) -> Tensor:
        """Return the weight ``name`` as it was, bit by bit."""
        options, (_, rows, depth) = self.options[name], self.shapes[name]
        if options.get("transposed"):
            rows, depth = depth, rows
        return unpack_experts(self.packed[name], rows=rows, depth=depth, **options)


def packed_weights(module: nn.Module) -> PackedWeights | None:
    """Return the packed weights in ``module``'s place, None if it has its parameters."""
    return module.__dict__.get(_ATTRIBUTE)


def pack_parameters(module: nn.Module, options: dict[str, dict[str, bool]]) -> None:
    """Put packed weights in the place of parameters of ``module``.

    The parameters are None until ``unpack_parameters``, so that anything but the packed forward
    fails for want of them. (Placeholders on the meta device would keep the count of parameters, but
    torch multiplies a CPU tensor with a meta one without complaint and returns what was in memory.)
    ``module.state_dict()`` gives the original values under the original names, in their order;
    loading one raises.

    Args:
        module: Owns the parameters; contiguous, on the CPU, of one dtype that ``pack_experts``
            takes.
        options: For each parameter's name, the options of ``pack_experts``.

    Raises:
        ValueError: A parameter is something else.
    """
    if packed_weights(module) is not None:
        return
    check_packable(module, options)
    weights = {name: module._parameters[name] for name in options}
    with torch.no_grad():
        held = PackedWeights(
            packed={n: pack_experts(w.detach(), **options[n]) for n, w in weights.items()},
            options=options,
            dtype=next(iter(weights.values())).dtype,
            requires_grad={name: weight.requires_grad for name, weight in weights.items()},
            shapes={name: weight.shape for name, weight in weights.items()},
        )
    for name in weights:
        module._parameters[name] = None
    setattr(module, _ATTRIBUTE, held)
    module.register_state_dict_post_hook(_give_originals)
    module.register_load_state_dict_pre_hook(_refuse_load)


def check_packable(module: nn.Module, options: dict[str, dict[str, bool]]) -> None:
    """Raise ValueError if ``pack_parameters`` could not pack ``module``; see there."""
    if packed_weights(module) is not None:
        return
    weights = [module._parameters.get(name) for name in options]
    kinds = {(w.device.type, w.dtype) if type(w) is nn.Parameter else None for w in weights}
    if len(kinds) != 1 or not kinds <= {("cpu", dtype) for dtype in PACKABLE}:
        raise ValueError(
            f"{type(module).__name__}: expected {', '.join(options)} to be parameters on the CPU "
            "of one dtype, float32, bfloat16 or float16"
        )


def unpack_parameters(module: nn.Module) -> None:
    """Give ``module`` its parameters back, with the values they had; nothing if it has them."""
    held = packed_weights(module)
    if held is None:
        return
    for name in held.packed:
        weight = held.original(name)
        module._parameters[name] = nn.Parameter(weight, requires_grad=held.requires_grad[name])
    delattr(module, _ATTRIBUTE)
    remove_hook(module._state_dict_hooks, _give_originals)
    remove_hook(module._load_state_dict_pre_hooks, _refuse_load)


def _give_originals(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    held = packed_weights(module)
    if held is None:
        return
    # The module's keys are the last ones; parameters come first among them.
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    for name in module._parameters:
        if name in held.packed:
            state_dict[prefix + name] = held.original(name)
        elif prefix + name in own:
            state_dict[prefix + name] = own.pop(prefix + name)
    state_dict.update(own)


def _refuse_load(module: nn.Module, state_dict: dict, prefix: str, *rest: Any) -> None:
    held, errors = packed_weights(module), rest[-1]
    for name in held.packed if held is not None else ():
        if prefix + name in state_dict:
            errors.append(
                f"{prefix}{name} is packed for inference; unpack the model to load into it."
            )


def remove_hook(hooks: OrderedDict, function: Any) -> None:
    """Take ``function`` out of a module's dictionary of ``hooks``."""
    # By function, not by handle: a deep copy of the module has hooks, but not the handles' numbers.
    for number, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is function:
            del hooks[number]
