"""Checkpoints of e4m3 weights with scales of 128 x 128 blocks, run by transformers with the ops.

transformers has modules for them (``FP8Experts``, ``FP8Linear``), but kernels only for GPUs: on
other machines it dequantises such a checkpoint as it loads it, to twice its size. The ops run
anywhere, so a model with ``experts_implementation="mergeme"`` keeps its weights as they are.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8GroupedLinear, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from mergeme_ext.integrations.experts_interface import activation_name
from mergeme_ext.moe.float8 import BLOCK, linear_float8, multiply_float8, scale_shape
from mergeme_ext.moe.slots import combine_slots, gather_slots
from mergeme_ext.ops import grouped_experts_fp8, sort_by_expert

__all__ = ["Float8Quantizer", "float8_experts_forward"]


def float8_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs.

    Args:
        experts: transformers' ``FP8Experts``.
        hidden_states: Tokens [T, H], float32, bfloat16 or float16.
        top_k_index: Integers [T, K], each in [0, E); E itself where the module runs its share of
            an expert-parallel group and the expert is another process's.
        top_k_weights: [T, K].

    Returns:
        [T, H], new, dtype of ``hidden_states``; summed in float32 over k in order, rounded once.

    Raises:
        NotImplementedError: The weights are not e4m3 with a float32 scale for each 128 x 128, or
            activations have scales of their own in the checkpoint, or a gradient is asked for.
    """
    _check_format(experts)
    weights, top_k = top_k_weights.float(), top_k_weights.shape[1]
    # An int64 id beyond int32 must not wrap round into the range.
    ids = top_k_index.clamp(-1, experts.num_experts + 1).to(torch.int32)
    routing = sort_by_expert(ids, experts.num_experts, sentinel=experts._is_expert_parallel)
    activation = _fused_activation(experts)
    down, down_scale = experts.down_proj, experts.down_proj_scale_inv
    if activation is not None:
        first, scale = experts.gate_up_proj, experts.gate_up_proj_scale_inv
        return grouped_experts_fp8(
            hidden_states, first, scale, down, down_scale, weights, *routing, activation=activation
        )
    offsets, permutation, inverse = routing
    rows = gather_slots(hidden_states, permutation, inverse, top_k)
    if experts.has_gate:
        parts = zip(
            experts.gate_up_proj.chunk(2, 1),
            experts.gate_up_proj_scale_inv.chunk(2, 1),
            strict=True,
        )
        both = [multiply_float8(rows, weight, scale, offsets) for weight, scale in parts]
        rows = experts._apply_gate(torch.cat(both, 1))
    else:
        up = multiply_float8(rows, experts.up_proj, experts.up_proj_scale_inv, offsets)
        rows = experts.act_fn(up)
    rows = multiply_float8(rows.to(hidden_states.dtype), down, down_scale, offsets)
    return combine_slots(rows, weights, permutation, inverse)


def _fused_activation(experts: nn.Module) -> str | None:
    """The activation with which the fused op computes what ``experts`` does, or None."""
    stock = (
        experts.has_gate
        and type(experts)._apply_gate is FP8Experts._apply_gate
        and "_apply_gate" not in vars(experts)
    )
    changed = (experts.swiglu_alpha, experts.limit, experts.gate_softcap)
    if not stock or any(value is not None for value in changed):
        return None
    return activation_name(experts.act_fn)


def _is_supported(block_size: object, activation_scheme: str, dtypes: set[torch.dtype]) -> bool:
    return (
        block_size is not None
        and list(block_size) == [BLOCK, BLOCK]
        and activation_scheme == "dynamic"
        and dtypes == {torch.float8_e4m3fn, torch.float32}
    )


def _check_format(module: nn.Module) -> None:
    dtypes = {p.dtype for name, p in module.named_parameters(recurse=False) if name != "bias"}
    if not _is_supported(module.block_size, module.activation_scheme, dtypes):
        raise NotImplementedError(
            f'{type(module).__name__}: expected for experts_implementation="mergeme" '
            f"float8_e4m3fn weights with float32 scales of blocks of [{BLOCK}, {BLOCK}] and "
            f"activations quantised as they come, got {sorted(map(str, dtypes))}, "
            f"{module.block_size} and {module.activation_scheme}"
        )


def _linear_forward(linear: nn.Module, input: Tensor) -> Tensor:
    if input.device.type != "cpu":
        return type(linear).forward(linear, input)
    return linear_float8(input, linear.weight, linear.weight_scale_inv, linear.bias)


class Float8Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' loader of such checkpoints, which need not be dequantised without a GPU.

    They are, as without it, unless the model runs with ``experts_implementation="mergeme"`` and
    the blocks are of 128 x 128 with float32 scales.
    """

    _no_gpu = False

    def validate_environment(self, *args, **kwargs) -> None:
        """As transformers does, but leave open whether a machine without a GPU dequantises."""
        before = self.quantization_config.dequantize
        super().validate_environment(*args, **kwargs)
        if self.quantization_config.dequantize and not before and not torch.cuda.is_available():
            self._no_gpu, self.quantization_config.dequantize = True, False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        config = self.quantization_config
        ours = _runs_mergeme(model)
        plain = config.scale_fmt == "float" and config.expert_dtype == "fp8"
        dtypes = {torch.float8_e4m3fn, torch.float32} if plain else set()
        if self._no_gpu and not (
            ours and _is_supported(config.weight_block_size, config.activation_scheme, dtypes)
        ):
            config.dequantize = True
        super()._process_model_before_weight_loading(model, **kwargs)
        if config.dequantize or not ours:
            return
        for name, module in model.named_modules():
            if self._no_gpu and isinstance(module, FP8GroupedLinear):
                raise NotImplementedError(
                    f"{name}: block-diagonal linear layers in e4m3 run on a GPU only; load the "
                    "model with FineGrainedFP8Config(dequantize=True)"
                )
            if isinstance(module, FP8Experts) and module.has_gate:
                _give_halves_their_scales(module)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self._no_gpu and not self.quantization_config.dequantize:
            for module in model.modules():
                if type(module) is FP8Linear:
                    # A bound method: a deep copy of the model must run its own weights.
                    module.forward = MethodType(_linear_forward, module)
        return model


def _runs_mergeme(model: nn.Module) -> bool:
    return any(
        getattr(module.config, "_experts_implementation", None) == "mergeme"
        for name, module in model.named_modules()
        if name.endswith(".experts") and hasattr(module, "config")
    )


def _give_halves_their_scales(experts: FP8Experts) -> None:
    """Room for the scales of gate and those of up, as checkpoints hold them.

    transformers counts the blocks over the rows of both together, which are fewer where one would
    straddle the two.
    """
    scale = experts.gate_up_proj_scale_inv
    shape = scale_shape(experts.intermediate_dim, experts.hidden_dim)
    if experts.block_size is not None and list(experts.block_size) == [BLOCK, BLOCK]:
        full = scale.new_empty(experts.num_experts, 2 * shape[0], shape[1])
        experts.gate_up_proj_scale_inv = nn.Parameter(full, requires_grad=scale.requires_grad)
