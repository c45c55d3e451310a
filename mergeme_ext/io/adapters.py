"""LoRA adapters in PEFT's format, applied to a base model row by row as it is read."""

import dataclasses
import json
import math
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.io import names
from mergeme_ext.io.format import CheckpointError, TensorInfo, load_json_object
from mergeme_ext.io.lora import Adapted, Shifted
from mergeme_ext.io.mapped import MappedFile
from mergeme_ext.io.operands import Operand
from mergeme_ext.io.pickled import PickledFile
from mergeme_ext.io.source import CheckpointSource

__all__ = ["AdaptedSource"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
# A pattern without repeated groups and with few repeats matches in polynomial time.
_REPEATS = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_MAX_REPEATS = 4
_PARTS = {
    ("lora_A", "weight"): "a",
    ("lora_B", "weight"): "b",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A", None): "embedding_a",
    ("lora_embedding_B", None): "embedding_b",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
# Keys of adapter_config.json that change what the tensors mean, if they are set; and why.
_REFUSED = {
    "layer_replication": "it stacks layers of the base model anew",
    "target_parameters": "it adapts fused experts, whose layout depends on PEFT's version",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "alora_invocation_tokens": "it acts on a part of the text only, which no merged weight can",
    "use_qalora": "its matrices act on grouped inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it routes between adapters while the model runs",
    "kasa_config": "it changes the base model's weights first",
    "monteclora_config": "its matrices are drawn while the model runs",
}
# Ways to start the training that take something out of the base model's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


class AdaptedSource:
    """A base model with a LoRA adapter on top, to be read like a checkpoint of its own.

    Adapted weights are computed in float32 when rows are read; nothing is ever copied whole.
    DoRA, biases and modules saved whole are honoured.

    Args:
        base: The model that the adapter was trained on.
        adapter: Folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or
            ``.bin``, read like a ``.bin`` checkpoint).

    Raises:
        CheckpointError: The adapter is of another kind, is damaged, or does not fit the base.

    Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA); Liu et
        al. 2024, arXiv:2402.09353 (DoRA).
    """

    def __init__(self, base: CheckpointSource, adapter: str | Path):
        self.base = base
        self.path = base.path
        self.adapter_path = Path(adapter)
        self._settings = self._read_settings()
        self._file = self._open_weights()
        self._infos = {info.name: info for info in self._file.infos}
        self._config = base.config
        self._dropped = base.dropped
        self._replaced: dict[str, str] = {}  # tensor of the model -> tensor of the adapter
        self._lora: dict[str, dict[str, str]] = {}  # module -> part -> tensor of the adapter
        self._sort_tensors()
        self._flipped = self._orientations()
        for module, parts in self._lora.items():
            self._check_module(module, parts)
        for name, stored in list(self._replaced.items()):
            self._check_replaced(name, stored)

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter_path}: {message}")

    def _read_settings(self) -> dict[str, Any]:
        path = self.adapter_path / CONFIG
        if not _regular(path):
            raise self._error(f"expected an adapter's folder with {CONFIG}, found none")
        settings = load_json_object(path.read_bytes(), str(path))
        if (kind := settings.get("peft_type")) != "LORA":
            raise self._error(f"expected a LoRA adapter (peft_type LORA), got {kind!r}")
        for key, reason in _REFUSED.items():
            if settings.get(key):
                raise self._error(f"adapters with {key} are not applied: {reason}")
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise self._error(
                f"init_lora_weights is {start!r}: training changed the base model's weights too, "
                "so the adapter does not fit the published ones; convert it to plain LoRA with "
                "path_initial_model_for_weight_conversion of PEFT's save_pretrained"
            )
        if settings.get("use_dora") and settings.get("lora_bias"):
            raise self._error("use_dora together with lora_bias has no weights that do the same")
        return settings

    def _open_weights(self) -> MappedFile | PickledFile:
        for name in WEIGHTS:
            if _regular(self.adapter_path / name):
                kind = PickledFile if name.endswith(".bin") else MappedFile
                return kind(self.adapter_path / name)
        raise self._error(f"expected {' or '.join(WEIGHTS)} in the folder")

    def _sort_tensors(self) -> None:
        for stored in self._infos:
            name = stored.removeprefix(_PREFIX)
            match = _KEY.fullmatch(name)
            if match is None:
                name = name.replace(".modules_to_save.default.", ".")
                name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
                target, table, part = name, self._replaced, name
            else:
                part = _PARTS.get((match["part"], match["leaf"]))
                target = f"{match['module']}.{'bias' if part == 'bias' else 'weight'}"
                table = self._lora.setdefault(match["module"], {})
            if part is None or target not in self.base:
                if self._is_tied_head(target, stored):
                    self._dropped[stored] = "equal to the embedding, which it is tied to"
                    continue
                raise self._error(
                    f"tensor {stored!r} matches nothing: {self.base.label} has no tensor {target!r}"
                )
            if part in table:
                raise self._error(f"tensors {table[part]!r} and {stored!r} say the same")
            table[part] = stored

    def _is_tied_head(self, target: str, stored: str) -> bool:
        """Whether a tensor is the head of a tied model, saved along with an equal embedding."""
        if target != names.HEAD or not self._config.get("tie_word_embeddings"):
            return False
        for other in (names.EMBEDDING, names.EMBEDDING.replace(".weight", ".base_layer.weight")):
            if (info := self._infos.get(_PREFIX + other)) is not None:
                mine = self._file.tensor(self._infos[stored])
                return torch.equal(mine, self._file.tensor(info))
        return False

    def _orientations(self) -> dict[str, bool]:
        """Return for each module whether its weight is stored as [in, out], as GPT-2's are.

        Shapes decide. For a square weight it is ``fan_in_fan_out``, which PEFT keeps for the last
        module only: if others contradict it, nobody can tell.
        """
        found: dict[str, bool | None] = {}
        for module, parts in self._lora.items():
            if "a" not in parts or "b" not in parts:
                continue
            a, b = (self._infos[parts[part]].shape for part in ("a", "b"))
            weight = self.base.info(f"{module}.weight").shape
            if len(a) == len(b) == len(weight) == 2 and a[0] == b[1]:
                fits = [weight == (b[0], a[1]), weight == (a[1], b[0])]
                found[module] = None if all(fits) else fits[1] if any(fits) else False
        flag = bool(self._settings.get("fan_in_fan_out"))
        unclear = [module for module, flipped in found.items() if flipped is None]
        if unclear and (not flag) in found.values():
            raise self._error(
                f"fan_in_fan_out is {flag}, which other modules contradict, so the layout of "
                f"{unclear[0]}.weight, which is square, is in doubt"
            )
        return {module: flag if f is None else f for module, f in found.items()}

    def _check_module(self, module: str, parts: Mapping[str, str]) -> None:
        embedding = "embedding_a" in parts or "embedding_b" in parts
        pair = ("embedding_a", "embedding_b") if embedding else ("a", "b")
        what = f"{module}: expected"
        if missing := [part for part in pair if part not in parts]:
            raise self._error(f"{what} matrices A and B, {missing[0]} is missing")
        if ("magnitude" in parts) != bool(self._settings.get("use_dora")):
            raise self._error(f"{what} a magnitude vector if and only if use_dora is set")
        a, b = (self._infos[parts[part]] for part in pair)
        for info in (self._infos[name] for name in parts.values()):
            if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
                raise self._error(f"{what} {info.name} in 16 bits or more, got {info.dtype}")
        weight = self.base.info(f"{module}.weight").shape
        if len(weight) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
            raise self._error(
                f"{what} matrices, got a weight {list(weight)}, A {list(a.shape)} and "
                f"B {list(b.shape)}; convolutions are not adapted"
            )
        rank, _ = self._rank_and_scale(module)
        flipped = embedding or self._flipped.get(module, False)
        outputs, inputs = weight[::-1] if flipped else weight
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise self._error(
                f"{what} A [{rank}, {inputs}] and B [{outputs}, {rank}] for a weight "
                f"{list(weight)} and the rank of {CONFIG}, got {list(a.shape)} and {list(b.shape)}"
            )
        for part, tensor in (("magnitude", f"{module}.weight"), ("bias", f"{module}.bias")):
            if part in parts and self._infos[parts[part]].shape != (outputs,):
                raise self._error(
                    f"{what} {parts[part]} of shape [{outputs}] for {tensor}, got "
                    f"{list(self._infos[parts[part]].shape)}"
                )

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        rank = self._by_pattern(module, "rank_pattern", self._settings.get("r"))
        alpha = self._by_pattern(module, "alpha_pattern", self._settings.get("lora_alpha"))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise self._error(f"{module}: expected r as a number of at least 1, got {rank!r}")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._error(f"{module}: expected lora_alpha as a number, got {alpha!r}")
        root = self._settings.get("use_rslora")
        return rank, alpha / (math.sqrt(rank) if root else rank)

    def _by_pattern(self, module: str, key: str, default: Any) -> Any:
        """Return the value of the first pattern that matches the end of a module's name."""
        patterns = self._settings.get(key) or {}
        if not isinstance(patterns, dict):
            raise self._error(f"expected {key} to map patterns to numbers, got {patterns!r:.60}")
        for pattern, value in patterns.items():
            if len(_REPEATS.findall(pattern)) > _MAX_REPEATS or _REPEATED_GROUP.search(pattern):
                raise self._error(
                    f"{key}: expected a simple pattern, got {pattern!r:.60}, which could take "
                    "forever to match"
                )
            try:
                with warnings.catch_warnings(action="ignore"):
                    matched = re.match(rf"(.*\.)?({pattern})$", module)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._error(
                    f"{key}: expected a regular expression, got {pattern!r:.60} ({error})"
                ) from None
            if matched:
                return value
        return default

    def _check_replaced(self, name: str, stored: str) -> None:
        old, new = self.base.info(name).shape, self._infos[stored].shape
        if old == new:
            return
        resized = name in (names.EMBEDDING, names.HEAD) and old[1:] == new[1:]
        if not resized or self._config.get("vocab_size") not in (old[0], new[0]):
            raise self._error(
                f"tensor {stored!r}: expected {list(old)} as in {self.base.label}, got {list(new)}"
            )
        self._config["vocab_size"] = new[0]

    @property
    def label(self) -> str:
        """What messages call the model."""
        return f"{self.base.label}+{self.adapter_path}"

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer that the embedding's rows belong to lies, if there is one."""
        sources = (self, self.base) if names.EMBEDDING in self else ()
        rows = [source.info(names.EMBEDDING).shape for source in sources]
        own = any(_regular(self.adapter_path / name) for name in TOKENIZER)
        return self.adapter_path if own and len(set(rows)) > 1 else self.base.tokenizer_folder

    @property
    def names(self) -> list[str]:
        """All tensor names, in the order in which the base's data lie on disk."""
        return self.base.names

    @property
    def dropped(self) -> dict[str, str]:
        """Tensors on disk that are not among ``names``, and why."""
        return dict(self._dropped)

    @property
    def applied(self) -> dict[str, str]:
        """The adapter's tensors, and which tensor of the model each changes or replaces."""
        out = {stored: name for name, stored in self._replaced.items()}
        for module, parts in self._lora.items():
            for part, stored in parts.items():
                out[stored] = f"{module}.{'bias' if part == 'bias' else 'weight'}"
        return out

    @property
    def config(self) -> dict[str, Any]:
        """A copy of the base's ``config.json``, with the adapter's vocabulary size."""
        return json.loads(json.dumps(self._config))

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __len__(self) -> int:
        return len(self.base)

    def _adapts(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        parts = self._lora.get(module, {})
        return "bias" in parts if leaf == "bias" else leaf == "weight" and bool(parts)

    def info(self, name: str) -> TensorInfo:
        """Return name, dtype and shape of tensor ``name`` as ``operand`` gives it.

        Raises:
            CheckpointError: There is no such tensor.
        """
        info = self.base.info(name)
        if name in self._replaced:
            new = self._infos[self._replaced[name]]
            info = dataclasses.replace(info, dtype=new.dtype, shape=new.shape)
        if self._adapts(name):
            info = dataclasses.replace(info, dtype=torch.float32)
        return info

    def default_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that tensor ``name`` should have in a result that keeps dtypes."""
        return self.base.default_dtype(name)

    def bytes_to_read(self, name: str) -> int:
        """Return how many bytes of the files tensor ``name`` is computed from."""
        stored = list(self._stored_parts(name))
        if name in self._replaced:
            stored.append(self._replaced[name])
        read = sum(self._infos[part].nbytes for part in stored)
        return read + (0 if name in self._replaced else self.base.bytes_to_read(name))

    def _stored_parts(self, name: str) -> list[str]:
        if not self._adapts(name):
            return []
        parts = self._lora[name.rpartition(".")[0]]
        bias = name.endswith(".bias")
        return [stored for part, stored in parts.items() if (part == "bias") == bias]

    def tensor(self, name: str) -> Tensor:
        """Return tensor ``name`` as a read-only view of a mapped file.

        Raises:
            CheckpointError: There is no such tensor, or its values have to be computed.
        """
        if self._adapts(name):
            raise self._error(f"tensor {name!r} is adapted by LoRA, which only a merge applies")
        if name in self._replaced:
            return self._file.tensor(self._infos[self._replaced[name]])
        return self.base.tensor(name)

    def operand(self, name: str) -> Operand:
        """Return tensor ``name`` as an operand: stored if no LoRA acts on it.

        Raises:
            CheckpointError: There is no such tensor.
        """
        operand = self._part(self._replaced[name]) if name in self._replaced else None
        operand = operand or self.base.operand(name)
        if not self._adapts(name):
            return operand
        module, _, leaf = name.rpartition(".")
        parts = self._lora[module]
        _, scale = self._rank_and_scale(module)
        if leaf == "bias":
            return Shifted(operand, self._part(parts["bias"]), scale)
        transposed = "embedding_a" in parts or self._flipped.get(module, False)
        a, b = (self._part(parts.get(f"embedding_{p}") or parts[p]) for p in ("a", "b"))
        magnitude = self._part(parts["magnitude"]) if "magnitude" in parts else None
        return Adapted(operand, a, b, scale, transposed=transposed, magnitude=magnitude)

    def _part(self, stored: str) -> Operand:
        return self._file.operand(self._infos[stored])

    def prefetch(self, name: str) -> None:
        """Ask the system to start reading tensor ``name``; returns at once."""
        self.operand(name).prefetch()

    def release(self, name: str) -> None:
        """Give tensor ``name``'s memory back to the system; touching it again reads it again."""
        self.operand(name).release()
