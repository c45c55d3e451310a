"""Finding out, by running it, which options of ours a block of transformers computes."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mergeme_ext.moe.experts import ACTIVATIONS, run_experts
from mergeme_ext.moe.router import GROUP_SCORES, SCORES, RouterOptions
from mergeme_ext.ops import topk_gating

__all__ = ["RENAMED", "Block", "compare", "read_block"]

_BIAS = "e_score_correction_bias"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What transformers calls the parts, and what MoELayer does.
RENAMED = {"gate.weight": "router.weight", f"gate.{_BIAS}": "router.selection_bias"} | {
    f"shared_experts.{name}.weight": f"shared_expert.{name}.weight" for name in _PROJECTIONS
}

NUM_TOKENS = 32
# Of float32 sums of a few thousand products in any order; another formula is off by far more.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


class Block(NamedTuple):
    """What ``read_block`` found."""

    router: RouterOptions
    activation: str
    selection_bias: Tensor | None
    shared_expert: nn.Module | None
    shared_gate: nn.Module | None


@torch.no_grad()
def read_block(block: nn.Module) -> Block:
    """Return the options with which ``MoELayer`` computes what ``block`` does.

    Args:
        block: See ``MoELayer.from_transformers``.

    Raises:
        TypeError: ``block`` lacks a part, or has one more.
        ValueError: No options fit.
    """
    _check_parts(block)
    children = dict(block.named_children())
    return Block(
        _read_router(block.gate),
        _read_activation(block.experts),
        getattr(block.gate, _BIAS, None),
        children.get("shared_expert", children.get("shared_experts")),
        children.get("shared_expert_gate"),
    )


@torch.no_grad()
def compare(block: nn.Module, layer: nn.Module) -> None:
    """Raise ValueError unless ``layer`` gives what ``block`` gives, on random weights.

    The weights are of the block's H and E but of a small I, so that this is quick.
    """
    num_experts, hidden_size = block.gate.weight.shape
    shapes = {
        "gate.weight": (num_experts, hidden_size),
        f"gate.{_BIAS}": (num_experts,),
        "experts.gate_up_proj": (num_experts, 16, hidden_size),
        "experts.down_proj": (num_experts, hidden_size, 8),
        "shared_expert_gate.weight": (1, hidden_size),
    }
    for name in ("shared_expert", "shared_experts"):
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (8, hidden_size)
        shapes[f"{name}.down_proj.weight"] = (hidden_size, 8)
    names = [name for name in shapes if name in block.state_dict()]
    *drawn, x = _drawn(*(shapes[name] for name in names), (2, NUM_TOKENS // 2, hidden_size))
    theirs, ours = {}, {}
    for name, tensor in zip(names, drawn, strict=True):
        theirs[name] = tensor / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 10)
        ours[RENAMED.get(name, name)] = theirs[name]
    modes = [(module, module.training) for module in block.modules()]
    try:
        block.eval()
        expected = torch.func.functional_call(block, theirs, (x,))
    except Exception as error:
        raise _unfit(block, error) from error
    finally:
        for module, training in modes:
            module.training = training
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = torch.func.functional_call(layer.eval(), ours, (x,))
    if expected.shape != found.shape or not torch.allclose(found, expected, **TOLERANCE):
        raise ValueError(
            "MoELayer.from_transformers: expected a block that computes what its gate, experts and "
            f"shared expert make up, got {type(block).__name__}, which computes something else"
        )


def _check_parts(block: nn.Module) -> None:
    try:
        gate, experts = block.gate, block.experts
        num_experts, hidden_size = gate.weight.shape
        intermediate_size = experts.down_proj.shape[-1]
        shapes = experts.gate_up_proj.shape, experts.down_proj.shape
        _ = gate.top_k
    except (AttributeError, ValueError) as error:
        raise _unfit(block, error) from None
    expected = (
        (num_experts, 2 * intermediate_size, hidden_size),
        (num_experts, hidden_size, intermediate_size),
    )
    if shapes != expected:
        raise _unfit(block, f"gate_up_proj and down_proj are {shapes}, not {expected}")
    known = {"gate", "experts", "shared_expert", "shared_experts", "shared_expert_gate"}
    tensors = {
        "gate": {"weight", _BIAS},
        "experts": {"gate_up_proj", "down_proj"},
    }
    more = {name for name, _ in block.named_children()} - known
    for part, names in tensors.items():
        state = getattr(block, part).state_dict()
        more |= {f"{part}.{name}" for name in state.keys() - names}
    more |= {name for name in block.state_dict() if "." not in name}
    more |= {
        name
        for name in block.state_dict()
        if name.startswith("shared_expert") and name not in RENAMED and name not in RENAMED.values()
    } - {"shared_expert_gate.weight"}
    if more:
        raise _unfit(block, f"it also has {sorted(more)}")


def _unfit(block: nn.Module, why: object) -> TypeError:
    return TypeError(
        "MoELayer.from_transformers: expected a MixtralSparseMoeBlock of transformers 5 or a block "
        f"with the same parts, got {type(block).__name__}: {why}"
    )


def _read_router(gate: nn.Module) -> RouterOptions:
    """The options whose weights are those of ``gate``, on random tokens and weights."""
    num_experts, hidden_size = gate.weight.shape
    weight, x, bias = _drawn((num_experts, hidden_size), (NUM_TOKENS, hidden_size), (num_experts,))
    weight /= hidden_size**0.5
    tensors = {"weight": weight}
    if getattr(gate, _BIAS, None) is not None:
        tensors[_BIAS] = bias * 0.1
    theirs, logits = _route(gate, tensors, x)
    half = {name: t.bfloat16() for name, t in tensors.items()}
    _, wide = _route(gate, half, x.bfloat16())

    scale = getattr(gate, "routed_scaling_factor", None)
    groups = [(1, 1)]
    if getattr(gate, "num_group", None) and getattr(gate, "topk_group", None):
        groups.append((gate.num_group, gate.topk_group))
    choices = product(
        SCORES, (True, False), {1.0, 1.0 if scale is None else float(scale)}, groups, GROUP_SCORES
    )
    for score, renormalize, factor, (num_groups, top_groups), group_score in choices:
        options: RouterOptions = {
            "score": score,
            "renormalize": renormalize,
            "scale": factor,
            "num_groups": num_groups,
            "top_groups": top_groups,
            "group_score": group_score,
        }
        ids, weights = topk_gating(logits.float(), tensors.get(_BIAS), gate.top_k, **options)
        ours = torch.zeros_like(theirs).scatter(1, ids.long(), weights)
        if torch.allclose(ours, theirs, **TOLERANCE):
            options["selection_bias"] = _BIAS in tensors
            options["compute_dtype"] = torch.float32 if wide.dtype == torch.float32 else None
            return options
    raise ValueError(
        f"MoELayer.from_transformers: expected a router that TopKRouter can be, got "
        f"{type(gate).__name__}, whose weights none of its options give"
    )


def _route(gate: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of ``gate`` as a matrix [T, E], and its logits."""
    try:
        logits, *rest = torch.func.functional_call(gate, tensors, (x,))
        (ids,) = (t for t in rest if not t.is_floating_point())
        (weights,) = (t for t in rest if t.is_floating_point())
        dense = torch.zeros(logits.shape).scatter(1, ids.long(), weights.float())
    except Exception as error:
        raise ValueError(
            "MoELayer.from_transformers: expected a router that returns logits, weights and ids, "
            f"got {type(gate).__name__}: {error}"
        ) from error
    return dense, logits


def _read_activation(experts: nn.Module) -> str:
    """The activation with which the op gives what ``experts`` gives, on small random weights."""
    num_experts = experts.down_proj.shape[0]
    gate_up, down, x = _drawn((num_experts, 16, 8), (num_experts, 8, 8), (NUM_TOKENS, 8))
    ids = torch.arange(NUM_TOKENS)[:, None] % num_experts
    weights = torch.linspace(0.5, 2, NUM_TOKENS)[:, None]
    tensors = {"gate_up_proj": gate_up, "down_proj": down}
    try:
        theirs = torch.func.functional_call(experts, tensors, (x, ids, weights))
    except Exception as error:
        raise ValueError(
            "MoELayer.from_transformers: expected experts that take tokens, ids and weights, got "
            f"{type(experts).__name__}: {error}"
        ) from error
    for activation in ACTIVATIONS:
        ours = run_experts(x, gate_up, down, ids.int(), weights, activation=activation)
        # Coarser than the two gelus' difference would not do.
        if torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
            return activation
    name = type(getattr(experts, "act_fn", None)).__name__
    raise ValueError(
        "MoELayer.from_transformers: expected experts with one of the activations "
        f"{ACTIVATIONS} and gate rows before up rows, got {type(experts).__name__} with {name}"
    )


def _drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]
