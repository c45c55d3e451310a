"""Quantised checkpoints: FP8 weights and their scales, and which other formats are refused.

An FP8 checkpoint keeps its scales in tensors of their own. Every layout met in the wild means
``weight = code * scale``, whatever the scale's name:

=========================== ============================ =======================================
name                        shape of the scale           written by
=========================== ============================ =======================================
``NAME_scale_inv``          [ceil(out/bo), ceil(in/bi)]  DeepSeek, transformers (``fp8``)
``NAME_scale``              one element                  compressed-tensors, modelopt, quark
``NAME_scale``              [out], [out, 1]              compressed-tensors, ``fbgemm_fp8``
``MODULE.scale``            as ``NAME_scale_inv``        DeepSeek's own tools, for MODULE.weight
=========================== ============================ =======================================

Stacked experts [E, out, in] have one such grid per expert.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.io.format import CheckpointError, TensorInfo, dtype_name
from mergeme_ext.io.operands import Operand, check_rows

__all__ = ["FP8", "Dequantised", "Scaling", "find_scales", "without_quantisation"]

FP8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
_SCALE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e8m0fnu,
    torch.uint8,  # the bytes of float8_e8m0fnu
)
_KEYS = ("quantization_config", "compression_config")
_DEFAULT_BLOCK = (128, 128)
# Elements to look up at a time: the indices stay in a core's cache.
_PIECE = 2**15
_ZERO_POINT = "weight_zero_point"
# Values of quant_method whose FP8 weights are code times scale.
_FP8_METHODS = ("fp8", "fbgemm_fp8", "mxfp8", "compressed-tensors", "modelopt", "quark")
_ADVICE = (
    "merge the model that it was made from, or dequantise it first "
    "(dequantize and save_pretrained of transformers)"
)
# Names that give a format away, whether or not config.json tells; format and why it is refused.
_FORMATS = [
    (
        r"\.(nested_)?(absmax|quant_map)|\.quant_state\.bitsandbytes__\w+",
        "bitsandbytes 4-bit",
        "its weights are 4-bit codes into a table, scaled in blocks",
    ),
    (
        r"\.(SCB|weight_format)",
        "bitsandbytes 8-bit",
        "its weights are 8-bit integers in a layout of their own",
    ),
    (
        r"\.(qweight|qzeros)",
        "GPTQ or AWQ",
        "its weights are packed integers, scaled and shifted in groups",
    ),
    (r"\.weight_packed", "compressed-tensors' packed", "its weights are packed integers or FP4"),
    (
        r"\.(weight_scale_2|weight_global_scale)",
        "NVFP4",
        "its weights are packed 4-bit floats with scales of two levels",
    ),
    (r"\.W_q", "HQQ", "its weights are packed integers, scaled and shifted in groups"),
    (
        r"\.pre_quant_scale",
        "modelopt's smoothed",
        "its inputs are scaled while the model runs, so the weights are not those of the model",
    ),
]
_FORMATS = [(re.compile(rf".*(?:{pattern})"), *rest) for pattern, *rest in _FORMATS]
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes 4-bit",
    "bitsandbytes_8bit": "bitsandbytes 8-bit",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "gguf": "GGUF",
}
_ACTIVATIONS = re.compile(
    r"(?:.*[._])?(?:input|activation|output)_(?:scale|scale_ub|zero_point|global_scale)"
    r"|.*\.(?:q|k|v|kv|[kv]_cache)_(?:scale|zero_point)"
)


@dataclass(frozen=True)
class Scaling:
    """How the codes of one FP8 tensor become numbers.

    ``grid`` is the scale's shape with one size per dimension of the tensor, ``block`` says how
    many elements share a scale along each. Without a ``scale`` the codes are the numbers.
    """

    scale: str | None
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for part in (config, config.get("text_config")):
        for key in _KEYS:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping) and part[key]:
                return part[key]
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``config`` that describes the same model, dequantised."""
    out = json.loads(json.dumps(config))
    for part in (out, out.get("text_config")):
        if isinstance(part, dict):
            for key in _KEYS:
                part.pop(key, None)
    return out


def find_scales(
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    where: str,
    read: Callable[[str], Tensor],
) -> tuple[dict[str, Scaling], dict[str, str]]:
    """Return how to scale each FP8 tensor, and the tensors of no further use with the reason.

    Args:
        infos: Every tensor of the checkpoint.
        config: Its ``config.json``.
        where: Opens every message.
        read: Returns a tensor's values; used for zero points only.

    Raises:
        CheckpointError: A scale is missing, fits no layout or scales nothing; or the format is
            another than FP8.
    """
    quantisation = _quantisation(config)
    _refuse_other_formats(infos, quantisation, where)
    codes = [n for n, i in infos.items() if i.dtype in FP8 and not n.endswith(_ZERO_POINT)]
    if quantisation is None and not codes:
        return {}, {}
    blocks = _declared_blocks(quantisation, where)
    scalings: dict[str, Scaling] = {}
    dropped: dict[str, str] = {}
    for name in codes:
        if (scale := _scale_name(name, infos, where)) is None:
            scalings[name] = Scaling(None)
        else:
            method = (quantisation or {}).get("quant_method")
            scalings[name] = _layout(infos[name], infos[scale], blocks, method, where)
            dropped[scale] = f"the scale of {name}, which it was applied to"
    bare = [name for name, scaling in scalings.items() if scaling.scale is None]
    if bare and (quantisation is not None or len(bare) < len(codes)):
        raise CheckpointError(
            f"{where}: tensor {bare[0]!r} is {dtype_name(infos[bare[0]].dtype)} but has no scale: "
            f"expected one of {', '.join(_scale_names(bare[0]))}"
        )
    if not codes and _declares_weights(quantisation):
        raise CheckpointError(
            f"{where}: config.json says that the weights are quantised "
            f"({quantisation.get('quant_method')}), but no tensor is FP8; a tool may have cast "
            "them without their scales, or left quantization_config behind: remove it if the "
            "weights are right"
        )
    for name, info in infos.items():
        if name not in dropped and name not in scalings:
            reason = _leftover(name, info, infos, where, read)
            if reason is not None:
                dropped[name] = reason
    return scalings, dropped


def _refuse(where: str, what: str, label: str, reason: str) -> None:
    raise CheckpointError(
        f"{where}: {what}: the checkpoint is in {label} format, which is not read: {reason}; "
        f"{_ADVICE}"
    )


def _refuse_other_formats(
    infos: Mapping[str, TensorInfo], quantisation: Mapping[str, Any] | None, where: str
) -> None:
    method = None if quantisation is None else str(quantisation.get("quant_method"))
    for name, info in infos.items():
        for pattern, label, reason in _FORMATS:
            if pattern.fullmatch(name):
                _refuse(where, f"tensor {name!r}", _METHODS.get(method, label), reason)
        blocks = name.endswith("_blocks") and infos.get(name.removesuffix("_blocks") + "_scales")
        if blocks and info.dtype == blocks.dtype == torch.uint8:
            _refuse(
                where,
                f"tensor {name!r}",
                "MXFP4",
                "its weights are packed 4-bit floats, scaled in blocks of 32",
            )
        if info.dtype in (torch.int8, torch.uint8) and _scale_name(name, infos, where):
            _refuse(
                where,
                f"tensor {name!r}",
                _METHODS.get(method, "an integer or FP4"),
                f"its weights are {dtype_name(info.dtype)} with scales of their own",
            )
    if quantisation is None:
        return
    # Files of fbgemm and of early compressed-tensors name no method.
    if method not in (*_FP8_METHODS, "None"):
        _refuse(
            where,
            f"config.json has quant_method {method}",
            _METHODS.get(method, method),
            "only FP8 weights with their scales are dequantised",
        )
    sparsity = quantisation.get("sparsity_config") or {}
    layout = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if layout not in (None, "dense"):
        _refuse(
            where,
            f"config.json has a sparsity_config of format {layout!r:.60}",
            "compressed-tensors' sparse",
            "its zeros are left out of the files",
        )
    if quantisation.get("transform_config"):
        _refuse(
            where,
            "config.json has a transform_config",
            "compressed-tensors' rotated",
            "its weights are rotated, and rotated back while the model runs",
        )


def _scale_names(name: str) -> list[str]:
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        module = name.removesuffix(".weight")
        names += [f"{module}.scale", f"{module}.qscale_weight"]
    return names


def _scale_name(name: str, infos: Mapping[str, TensorInfo], where: str) -> str | None:
    found = [scale for scale in _scale_names(name) if scale in infos]
    if len(found) > 1:
        raise CheckpointError(f"{where}: tensor {name!r} has two scales, {' and '.join(found)}")
    return found[0] if found else None


def _groups(quantisation: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    groups = (quantisation or {}).get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            yield group["weights"]


def _declares_weights(quantisation: Mapping[str, Any] | None) -> bool:
    """Whether the config says that weights are quantised, and not just the cache of keys."""
    if quantisation is None:
        return False
    if quantisation.get("quant_method") in ("compressed-tensors", "modelopt", "quark"):
        return any(True for _ in _groups(quantisation)) or bool(quantisation.get("quant_algo"))
    return True


def _declared_blocks(
    quantisation: Mapping[str, Any] | None, where: str
) -> list[tuple[int, int]] | None:
    """Return the block sizes [out, in] that the config names; None if it says nothing of them."""
    if quantisation is None:
        return None
    found: list[Any] = []
    if "weight_block_size" in quantisation:
        if quantisation["weight_block_size"] is None:
            return []
        found.append(quantisation["weight_block_size"])
    for weights in _groups(quantisation):
        if (structure := weights.get("block_structure")) is not None:
            found.append(structure.split("x") if isinstance(structure, str) else structure)
        if weights.get("strategy") == "group":
            found.append([1, weights.get("group_size")])
    blocks = []
    for block in found:
        try:
            rows, columns = (int(size) for size in block)
        except (TypeError, ValueError, OverflowError):
            rows = columns = 0
        if rows < 1 or columns < 1:
            raise CheckpointError(
                f"{where}: expected the block size of quantization_config as two sizes of at "
                f"least 1, got {block!r:.60}"
            )
        blocks.append((rows, columns))
    return blocks or None


def _layout(
    tensor: TensorInfo,
    scale: TensorInfo,
    declared: list[tuple[int, int]] | None,
    method: str | None,
    where: str,
) -> Scaling:
    shape, sizes = tensor.shape, scale.shape
    what = f"{where}: tensor {scale.name!r}"
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{what}: expected a scale in floating point, got {dtype_name(scale.dtype)}"
        )
    blocks = declared
    if blocks is None:
        blocks = [] if scale.name == f"{tensor.name}_scale" else [_DEFAULT_BLOCK]
    whole = tuple(max(size, 1) for size in shape)
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    if scale.numel == 1:
        found.add(((1,) * len(shape), whole))
    elif len(shape) in (2, 3):
        *experts, rows, columns = shape
        ones = (1,) * len(experts)
        transposed = _transposed_layout(shape, sizes, method)
        if transposed:
            found.add(transposed)
        elif sizes == (*experts, rows, 1) or (not experts and sizes == (rows,)):
            found.add(((*experts, rows, 1), (*ones, 1, columns)))
        for block in blocks:
            block = (min(block[0], whole[-2]), min(block[1], whole[-1]))
            grid = (*experts, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
            if sizes == grid:
                found.add((grid, (*ones, *block)))
        if experts:
            found |= _stacked_layouts(tensor, sizes, declared)
    if len(found) != 1:
        wanted = " or ".join(f"{rows} x {columns}" for rows, columns in blocks)
        raise CheckpointError(
            f"{what}: expected one scale, one per row{', or one per block of ' if blocks else ''}"
            f"{wanted} of {tensor.name} {list(shape)}, got {list(sizes)}"
        )
    ((grid, block),) = found
    return Scaling(scale.name, grid, block)


def _transposed_layout(
    shape: tuple[int, ...], sizes: tuple[int, ...], method: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the layout of stacked experts [E, in, out] as fbgemm writes them; None if not so.

    The scale belongs to the last dimension, also where its shape suggests the other one.
    """
    if method != "fbgemm_fp8" or len(shape) != 3:
        return None
    experts, rows, columns = shape
    if sizes not in ((experts, 1, columns), (experts, columns, 1)):
        return None
    return (experts, 1, columns), (1, rows, 1)


def _stacked_layouts(
    tensor: TensorInfo,
    sizes: tuple[int, ...],
    declared: list[tuple[int, int]] | None,
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return further layouts of a scale that fit stacked experts [E, out, in]."""
    experts, rows, columns = tensor.shape
    found = set()
    if sizes in ((experts,), (experts, 1), (experts, 1, 1)):
        found.add(((experts, 1, 1), (1, rows, columns)))
    # One scale for the gate's rows and one for the up rows.
    fused = tensor.name.endswith("gate_up_proj") and rows % 2 == 0 and not declared
    if fused and sizes == (experts, 2, 1):
        found.add(((experts, 2, 1), (1, rows // 2, columns)))
    return found


def _leftover(
    name: str,
    info: TensorInfo,
    infos: Mapping[str, TensorInfo],
    where: str,
    read: Callable[[str], Tensor],
) -> str | None:
    """Return why a tensor of a quantised checkpoint is of no further use; None if it is."""
    if name.endswith(_ZERO_POINT):
        if read(name).reshape(-1).view(torch.uint8).count_nonzero():
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected zero points of 0, as FP8 has, got others"
            )
        return "zero points, all of them 0"
    for suffix in ("_scale_inv", "_scale"):
        scaled = name.removesuffix(suffix)
        if scaled == name or not (suffix == "_scale_inv" or scaled.endswith("weight")):
            continue
        state = dtype_name(infos[scaled].dtype) if scaled in infos else "missing"
        raise CheckpointError(
            f"{where}: tensor {name!r} scales {scaled}, which should be FP8 but is {state}"
        )
    if _ACTIVATIONS.fullmatch(name):
        return "scales activations while a quantised model runs, and no weight"
    return None


class Dequantised:
    """An FP8 tensor as float32 numbers: each code times its scale, rounded once.

    Args:
        codes: The FP8 tensor.
        scale: Its scale; None if the codes are the numbers.
        scaling: Which element is scaled by what.
    """

    dtype = torch.float32

    def __init__(self, codes: Operand, scale: Operand | None, scaling: Scaling):
        self.shape = codes.shape
        self._codes = codes
        self._scale = scale
        self._scaling = scaling

    def stored(self) -> None:
        """Return None: the numbers lie nowhere."""
        return None

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)`` as float32."""
        check_rows(self, begin, end)
        numbers = _decode(self._codes.rows(begin, end))
        if self._scale is None or numbers.numel() == 0:
            return numbers
        grid, block = self._scaling.grid, self._scaling.block
        if math.prod(grid) == 1:
            return numbers.mul_(self._grid(0, 1).view(()))
        scale = self._grid(begin // block[0], -(-end // block[0]))
        if len(grid) == 2:
            _scale_matrix(numbers, scale, block, begin % block[0])
        else:
            for matrix, expert_scale in zip(numbers, scale, strict=True):
                _scale_matrix(matrix, expert_scale, block[1:], 0)
        return numbers

    def _grid(self, begin: int, end: int) -> Tensor:
        scale = self._scale.stored()
        if scale is None:
            scale = self._scale.rows(0, self._scale.shape[0] if self._scale.shape else 1)
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        return scale.reshape(self._scaling.grid or (1,))[begin:end].to(torch.float32)

    def prefetch(self) -> None:
        """Ask the system to start reading codes and scale."""
        self._codes.prefetch()
        if self._scale is not None:
            self._scale.prefetch()

    def release(self) -> None:
        """Give the memory of codes and scale back to the system."""
        self._codes.release()
        if self._scale is not None:
            self._scale.release()


@functools.cache
def _numbers_of(dtype: torch.dtype) -> Tensor:
    """Return what each byte means, as float32."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).to(torch.float32)


def _decode(codes: Tensor) -> Tensor:
    """Return FP8 codes as float32: looked up, at six times the speed of a conversion by torch."""
    numbers = torch.empty(codes.shape, dtype=torch.float32)
    table = _numbers_of(codes.dtype)
    pieces = (t.reshape(-1).split(_PIECE) for t in (codes.view(torch.uint8), numbers))
    for raw, out in zip(*pieces, strict=True):
        torch.index_select(table, 0, raw.to(torch.int32), out=out)
    return numbers


def _scale_matrix(matrix: Tensor, scale: Tensor, block: tuple[int, ...], skipped: int) -> None:
    """Multiply ``matrix``, whose first row is row ``skipped`` of its block, by its scales."""
    rows, columns = matrix.shape
    scale = scale.index_select(0, torch.arange(skipped, skipped + rows) // block[0])
    whole = columns // block[1]
    edge = whole * block[1]
    matrix[:, :edge].view(rows, whole, block[1]).mul_(scale[:, :whole, None])
    if edge < columns:
        matrix[:, edge:].mul_(scale[:, whole:])
