"""Runs the Mixture-of-Experts blocks of a transformers model with the package's ops."""

import functools
from types import MethodType, TracebackType

import torch
from torch import Tensor, nn

from mergeme_ext.moe.experts import run_experts
from mergeme_ext.moe.layer import check_silu
from mergeme_ext.moe.packed_module import (
    check_packable,
    pack_parameters,
    packed_weights,
    remove_hook,
    unpack_parameters,
)
from mergeme_ext.ops import topk_gating

__all__ = ["SwappedExperts", "pack_for_inference", "register", "unpack", "use_mergeme_experts"]


def register(*, cache: bool = True) -> None:
    """Add "mergeme" to the implementations that ``experts_implementation`` of transformers names.

    ``from_pretrained(..., experts_implementation="mergeme")``, a configuration's
    ``_experts_implementation`` and ``model.set_experts_implementation("mergeme")`` then serve every
    model whose experts use transformers' interface, in inference and training. Weights stay the
    model's own parameters. Call it again to change the option.

    Checkpoints of e4m3 weights with scales of 128 x 128 blocks (``quant_method`` "fp8", as
    DeepSeek-V3's) are served too, for inference: on a GPU the experts alone, elsewhere the linear
    layers as well, so that loading need not dequantise them. See ``integrations/float8.py``.

    Args:
        cache: For inference on the CPU keep packed copies of the experts' weights, made on first
            use: as much memory again as the experts take. See ``pack_for_inference`` for packed
            weights without their originals.

    Raises:
        ImportError: transformers is missing, or older than its experts interface.
    """
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        from mergeme_ext.integrations.experts_interface import experts_forward
        from mergeme_ext.integrations.float8 import Float8Quantizer, float8_experts_forward
    except ImportError as error:
        raise ImportError(
            "register: expected a transformers 5 with an experts interface to be installed; "
            f"run: pip install --upgrade 'mergeme_ext[hf]' ({error})"
        ) from error
    forward = experts_forward if cache else functools.partial(experts_forward, cache=False)
    ALL_EXPERTS_FUNCTIONS.register("mergeme", forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register("mergeme", float8_experts_forward)
    # register_quantizer() refuses a name that is taken.
    AUTO_QUANTIZER_MAPPING["fp8"] = Float8Quantizer


def pack_for_inference(model: nn.Module) -> None:
    """Put packed weights in the place of the experts' parameters of ``model``.

    Without this, inference on the CPU keeps packed copies beside the parameters, which doubles the
    experts' memory; with it there are only the packed ones. One module is packed after the other,
    so that the peak is one module's weights more. Results are the same.

    Until ``unpack(model)``: ``state_dict`` and ``save_pretrained`` give the original names and
    values; the parameters themselves are None and not counted; training, loading a state dict,
    other experts implementations and running on another device raise.

    Args:
        model: On the CPU, in float32, bfloat16 or float16, with
            ``experts_implementation="mergeme"``.

    Raises:
        ValueError: The model has no such experts, or they are somewhere else or in another dtype.
    """
    from mergeme_ext.integrations.experts_interface import packing_options

    options = {}
    for module in model.modules():
        if is_experts(module) and module.config._experts_implementation == "mergeme":
            options[module] = packing_options(module)
    if not options:
        raise ValueError(
            'pack_for_inference: expected a model with experts_implementation="mergeme", '
            f"got {type(model).__name__} without experts that run it"
        )
    for module, layout in options.items():
        check_packable(module, layout)
    for module, layout in options.items():
        if packed_weights(module) is None:
            pack_parameters(module, layout)
            module.register_forward_pre_hook(_refuse_others)


def unpack(model: nn.Module) -> None:
    """Give the experts of ``model`` their parameters back, bit for bit what they were.

    They are new parameters: an optimiser made before ``pack_for_inference`` does not know them.

    Args:
        model: Any; what is not packed stays as it is.
    """
    for module in model.modules():
        if packed_weights(module) is not None:
            unpack_parameters(module)
            remove_hook(module._forward_pre_hooks, _refuse_others)


def _refuse_others(experts: nn.Module, inputs: tuple) -> None:
    kind = experts.config._experts_implementation
    if kind != "mergeme":
        raise RuntimeError(
            f"{type(experts).__name__}: weights packed for inference run with "
            f'experts_implementation="mergeme" only, got {kind!r}; unpack the model'
        )


def is_experts(module: nn.Module) -> bool:
    """Return whether ``module``'s class dispatches through transformers' experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_concatenated")


class SwappedExperts:
    """The blocks that ``use_mergeme_experts`` changed; ``with`` puts them back at its end."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def restore(self) -> None:
        """Give the blocks their stock forward back."""
        for block in self.blocks:
            vars(block.gate).pop("forward", None)
            vars(block.experts).pop("forward", None)

    def __enter__(self) -> "SwappedExperts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()


def use_mergeme_experts(model: nn.Module) -> SwappedExperts:
    """Let every Mixtral block in ``model`` compute as ``mergeme_ext.moe.MoELayer`` does.

    Modules, parameters and their names stay as they are, so that saving, hooks,
    ``output_router_logits`` and training work as before; only what the router and the experts
    execute changes.

    Args:
        model: Holds at least one ``MixtralSparseMoeBlock`` (``MixtralForCausalLM``, for one).

    Returns:
        A handle. Ignore it to keep the change; use it in a ``with`` statement, or call its
        ``restore()``, to undo it.

    Raises:
        ImportError: transformers is missing.
        ValueError: The model has no such block, or its activation is not SiLU.
    """
    try:
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise ImportError(
            "use_mergeme_experts: expected transformers 5 to be installed; "
            f"run: pip install 'mergeme_ext[hf]' ({error})"
        ) from error
    blocks = [module for module in model.modules() if isinstance(module, MixtralSparseMoeBlock)]
    if not blocks:
        raise ValueError(
            "use_mergeme_experts: expected a model with MixtralSparseMoeBlock modules, "
            f"got {type(model).__name__} without one"
        )
    for block in blocks:
        check_silu(block.experts)
    for block in blocks:
        # Bound methods, not closures: a deep copy of the model must run its own weights.
        block.gate.forward = MethodType(_route, block.gate)
        block.experts.forward = MethodType(_run, block.experts)
    return SwappedExperts(blocks)


def _route(gate: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The router in the order that transformers' blocks unpack: logits, weights, ids."""
    tokens = hidden_states.reshape(-1, gate.weight.shape[1])
    logits = nn.functional.linear(tokens, gate.weight)
    topk_ids, topk_weights = topk_gating(logits, None, gate.top_k)
    return logits, topk_weights, topk_ids


def _run(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return run_experts(
        hidden_states,
        experts.gate_up_proj,
        experts.down_proj,
        top_k_index.to(torch.int32),
        top_k_weights,
    )
