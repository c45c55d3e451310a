"""Would transformers load these tensors as this model? Asked without reading a weight.

``ModelCheck`` asks in a process of its own, as the import of transformers takes longer than many a
merge; this file, run as a program, is that process.
"""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["ModelCheck", "WouldNotLoad", "problems_of"]

# Old checkpoints carry this buffer; transformers computes it and drops what is in the file.
_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_SHOWN = 3


class WouldNotLoad(RuntimeError):
    """A result that transformers would not load; what is written of it can be taken up again."""


class ModelCheck:
    """A question under way; ``problems`` waits for the answer.

    Args:
        config: The result's ``config.json``.
        tensors: Name and shape of each of its tensors.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Iterable[tuple[str, Sequence[int]]]):
        self._process = None
        if not config.get("architectures") or importlib.util.find_spec("transformers") is None:
            return
        question = {"config": dict(config), "tensors": {n: list(s) for n, s in tensors}}
        # Files, not pipes: nobody reads along while the merge runs.
        self._question = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._answer = tempfile.TemporaryFile("w+")  # noqa: SIM115
        json.dump(question, self._question)
        self._question.seek(0)
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: nothing is imported from where it is run
            stdin=self._question,
            stdout=self._answer,
            stderr=subprocess.DEVNULL,
        )

    def problems(self) -> list[str]:
        """Return what transformers would complain about, in words; empty if nothing.

        Also empty if it cannot be asked: it is not installed, or does not know the model.
        """
        if self._process is None or self._process.wait() != 0:
            return []
        self._answer.seek(0)
        with contextlib.suppress(ValueError):
            return json.load(self._answer)
        return []

    def cancel(self) -> None:
        """Stop asking."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def problems_of(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> list[str]:
    """Return how ``tensors`` (name to shape) differ from what ``config``'s model loads.

    The model is made on the meta device, so neither memory nor time depend on its size.

    Raises:
        ValueError: transformers does not know the model.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, config["architectures"][0], None)
    if kind is None:
        raise ValueError(f"transformers has no {config['architectures'][0]}")
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = kind._from_config(settings)
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", {}) or ())
    # On disk a model may be laid out as in memory or as its first release was.
    ways = [state, revert_weight_conversion(model, state)]
    untied = {name: t for name, t in state.items() if name not in tied}
    needed = {*untied, *revert_weight_conversion(model, untied)}
    ways = [{name: list(t.shape) for name, t in way.items()} for way in ways]
    # Or without what stands before the names of everything but the head, as GPT-2's is.
    prefix = f"{kind.base_model_prefix}."
    if not any(name.startswith(prefix) for name in tensors):
        ways = [{name.removeprefix(prefix): s for name, s in way.items()} for way in ways]
        needed = {name.removeprefix(prefix) for name in needed}
    expected = min(ways, key=lambda way: len(way.keys() ^ tensors.keys()))
    missing = sorted((expected.keys() & needed) - tensors.keys())
    ignored = [
        re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", []) or []
    ]
    unexpected = [
        name
        for name in sorted(tensors.keys() - expected.keys())
        if not _COMPUTED.fullmatch(name)
        and not _is_predictor(name, config)
        and not any(p.search(name) for p in ignored)
    ]
    misshapen = [
        f"{name} is {list(tensors[name])}, expected {expected[name]}"
        for name in sorted(expected.keys() & tensors.keys())
        if list(tensors[name]) != expected[name]
    ]
    out = []
    for what, found in (
        ("it would miss", missing),
        ("it would not know", unexpected),
        ("of another shape:", misshapen),
    ):
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            out.append(f"{what} {', '.join(found[:_SHOWN])}{more}")
    return out


def _is_predictor(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of the layers that predict further tokens, which transformers skips."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    first, count = (config.get(f"num_{k}_layers") or 0 for k in ("hidden", "nextn_predict"))
    return layer is not None and first <= int(layer[1]) < first + count


def _main() -> None:
    question = json.load(sys.stdin)
    json.dump(problems_of(question["config"], question["tensors"]), sys.stdout)


if __name__ == "__main__":
    _main()
