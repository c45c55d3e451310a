"""Measures how models differ from their base and from each other, as a stream."""

import contextlib
import functools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from mergeme_ext._version import __version__
from mergeme_ext.inspection.alignment import Aligned, align, labels_of
from mergeme_ext.inspection.figures import BLOCK, Figures, measure, pairs_of
from mergeme_ext.inspection.kinds import kind_of, kind_order, layer_of
from mergeme_ext.inspection.spectra import METHOD, PASSES, Spectrum, row_ranges, spectrum_of
from mergeme_ext.io import CheckpointSource
from mergeme_ext.io.operands import Operand

__all__ = ["Inspection", "StandOut", "TensorFigures", "inspect_models"]

# A chunk's temporaries fit the cache of one core; a task is what a thread takes at a time.
CHUNK_ELEMENTS = 16 * BLOCK
TASK_ELEMENTS = 16 * CHUNK_ELEMENTS
# Robust standard deviations from the median at which a layer stands out.
FAR = 3.5


class Progress(Protocol):
    """What shows progress: tqdm's bars do."""

    def update(self, n: int) -> Any:
        """Take note of ``n`` more bytes read."""

    def close(self) -> Any:
        """End the display."""


@dataclass(frozen=True)
class TensorFigures:
    """The figures of one tensor."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    figures: Figures


@dataclass(frozen=True)
class StandOut:
    """A layer that is far from the others in one figure.

    Attributes:
        figure: Which one: ``cosine``, ``sign_conflict`` or ``relative_norm``.
        of: Number of the pair or of the model; None if there is only one such figure.
        layer: The layer.
        value: Its value; ``median``: that of all layers.
        distance: From the median in robust standard deviations (1.4826 times the median distance).
    """

    figure: str
    of: int | None
    layer: int
    value: float
    median: float
    distance: float


@dataclass(frozen=True)
class Inspection:
    """What ``inspect_models`` found.

    Attributes:
        base: What to call the base; None without one.
        models: What to call the models.
        samples: Matrices per module kind whose spectra were taken.
        seed: Of the choice of these and of the iteration.
        tensors: Figures of every tensor.
        spectra: Of the sample, by tensor, then by model.
        left_out: Tensors that were not compared, and why.
    """

    base: str | None
    models: tuple[str, ...]
    samples: int
    seed: int
    tensors: tuple[TensorFigures, ...]
    spectra: tuple[Spectrum, ...]
    left_out: dict[str, str]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of models, in the order of the figures that are by pair."""
        return pairs_of(len(self.models))

    @property
    def kinds(self) -> list[str]:
        """All module kinds, from the embedding to the head."""
        return kind_order([t.kind for t in self.tensors])

    @property
    def layers(self) -> list[int]:
        """All layers, ascending."""
        return sorted({t.layer for t in self.tensors if t.layer is not None})

    def _sum(self, wanted: Callable[[TensorFigures], bool]) -> Figures:
        return sum((t.figures for t in self.tensors if wanted(t)), Figures.zero(len(self.models)))

    @cached_property
    def total(self) -> Figures:
        """Figures of the whole models."""
        return self._sum(lambda t: True)

    @cached_property
    def by_kind(self) -> dict[str, Figures]:
        """Figures of each module kind, all layers together."""
        return {kind: self._sum(lambda t, k=kind: t.kind == k) for kind in self.kinds}

    @cached_property
    def by_layer(self) -> dict[int, Figures]:
        """Figures of each layer, all kinds together."""
        return {layer: self._sum(lambda t, i=layer: t.layer == i) for layer in self.layers}

    @cached_property
    def by_layer_and_kind(self) -> dict[tuple[int, str], Figures]:
        """Figures of each module kind in each layer that has it."""
        out: dict[tuple[int, str], Figures] = {}
        for t in self.tensors:
            if t.layer is not None:
                key = (t.layer, t.kind)
                out[key] = out[key] + t.figures if key in out else t.figures
        return out

    @cached_property
    def stand_outs(self) -> list[StandOut]:
        """Layers far from the others, the farthest first."""
        series: dict[tuple[str, int | None], list[float]] = {}
        for figures in self.by_layer.values():
            for name in ("cosine", "relative_norm"):
                for number, value in enumerate(getattr(figures, name)):
                    series.setdefault((name, number), []).append(value)
            series.setdefault(("sign_conflict", None), []).append(figures.sign_conflict)
        out = []
        for (name, number), values in series.items():
            out += _far_ones(name, number, self.layers, values)
        return sorted(out, key=lambda s: -s.distance)

    def document(self) -> dict[str, Any]:
        """Return everything as JSON holds it: NaN as None, shares in [0, 1]."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "format": 1,
            "mergeme_ext": __version__,
            "base": self.base,
            "models": list(self.models),
            "pairs": [list(pair) for pair in self.pairs],
            "seed": self.seed,
            "samples": self.samples,
            "spectra_method": METHOD,
            "total": self.total.document(),
            "kinds": {kind: f.document() for kind, f in self.by_kind.items()},
            "layers": {str(layer): f.document() for layer, f in self.by_layer.items()},
            "stand_outs": [vars(s) for s in self.stand_outs],
            "tensors": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "layer": t.layer,
                    "shape": list(t.shape),
                    **t.figures.document(),
                }
                for t in self.tensors
            ],
            "spectra": [
                {
                    **vars(s),
                    "singular_values": list(s.singular_values),
                    "stable_rank": number(s.stable_rank),
                    "energy": number(s.energy),
                }
                for s in self.spectra
            ],
            "left_out": self.left_out,
        }


def _far_ones(
    name: str, number: int | None, layers: Sequence[int], values: Sequence[float]
) -> Iterator[StandOut]:
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 4:
        return
    median = statistics.median(finite)
    spread = 1.4826 * statistics.median(abs(v - median) for v in finite)
    # Layers that agree to a thousandth do not differ in a way that matters.
    spread = max(spread, 1e-3 * max(abs(v) for v in finite))
    for layer, value in zip(layers, values, strict=True):
        if spread > 0 and abs(value - median) > FAR * spread:
            distance = abs(value - median) / spread
            yield StandOut(name, number, layer, value, median, distance)


def inspect_models(
    models: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    samples: int = 3,
    seed: int = 0,
    progress: Callable[[int], Progress] | None = None,
) -> Inspection:
    """Compare ``models`` with ``base`` and with each other, tensor by tensor.

    Args:
        models: Checkpoint folders.
        base: The checkpoint they were fine-tuned from. Without it the weights themselves are
            compared, which says less: fine-tuned models are near each other anyway.
        samples: Matrices of each module kind whose spectra are taken; 0 for none.
        seed: Chooses them.
        progress: Called with the number of bytes to read; returns an object with ``update(n)``
            and ``close()``, such as a tqdm bar.

    Returns:
        The figures. They do not depend on the number of threads. Each thread holds chunks of
        CHUNK_ELEMENTS (a row if that is longer), and for a spectrum about a hundred vectors.

    Raises:
        CheckpointError: A checkpoint cannot be read or does not fit the others.
        ValueError: There is too little to compare, or ``samples`` is negative.
    """
    if samples < 0:
        raise ValueError(f"expected samples of at least 0, got {samples}")
    aligned = align(models, base)
    chosen = _sample(aligned, samples, seed)
    total = sum(_nbytes(aligned.sources, name) for name in aligned.names)
    total += sum(_nbytes(_with_base(aligned, m), name) * PASSES for name, m in chosen)
    bar = None if progress is None else progress(total)
    try:
        with _one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
            tensors = _sweep(aligned, pool, bar)
            spectra = _spectra(aligned, chosen, seed, pool, bar)
    finally:
        if bar is not None:
            bar.close()
    return Inspection(
        base=None if base is None else labels_of([base])[0],
        models=tuple(labels_of(models)),
        samples=samples,
        seed=seed,
        tensors=tuple(tensors),
        spectra=tuple(spectra),
        left_out=aligned.left_out,
    )


def _nbytes(sources: Sequence[CheckpointSource], name: str) -> int:
    return sum(source.info(name).nbytes for source in sources)


def _sweep(aligned: Aligned, pool: ThreadPoolExecutor, bar: Progress | None) -> list[TensorFigures]:
    """Return the figures of every tensor; the pool's threads take parts of it."""
    out = []
    for position, name in enumerate(aligned.names):
        for following in aligned.names[position + 1 : position + 2]:
            for source in aligned.sources:
                source.prefetch(following)
        operands = [source.operand(name) for source in aligned.sources]
        measured = functools.partial(_measure_rows, operands, aligned.base is not None)
        parts = pool.map(measured, row_ranges(operands[0], TASK_ELEMENTS))
        figures = sum(parts, Figures.zero(len(aligned.models)))
        for operand in operands:
            operand.release()
        shape = operands[0].shape
        out.append(TensorFigures(name, kind_of(name), layer_of(name), shape, figures))
        if bar is not None:
            bar.update(_nbytes(aligned.sources, name))
    return out


def _measure_rows(operands: Sequence[Operand], has_base: bool, rows: tuple[int, int]) -> Figures:
    flat = [operand.rows(*rows).reshape(-1) for operand in operands]
    figures = Figures.zero(len(operands) - has_base)
    for start in range(0, flat[0].numel(), CHUNK_ELEMENTS):
        parts = [f[start : start + CHUNK_ELEMENTS] for f in flat]
        base = parts.pop(0) if has_base else None
        figures += measure(base, parts)
    return figures


def _sample(aligned: Aligned, samples: int, seed: int) -> list[tuple[str, int]]:
    """Return tensor and model of every spectrum to take: ``samples`` matrices of each kind."""
    by_kind: dict[str, list[str]] = {}
    for name in aligned.names:
        shape = aligned.sources[0].info(name).shape
        if len(shape) == 2 and min(shape) >= 2:
            by_kind.setdefault(kind_of(name), []).append(name)
    chosen = set()
    for kind, names in by_kind.items():
        # Sorted, so that the order on disk does not change the choice.
        choice = random.Random(f"{seed}:{kind}").sample(sorted(names), min(samples, len(names)))
        chosen.update(choice)
    numbers = range(len(aligned.models))
    return [(name, m) for name in aligned.names if name in chosen for m in numbers]


def _with_base(aligned: Aligned, model: int) -> list[CheckpointSource]:
    source = aligned.models[model]
    return [source] if aligned.base is None else [aligned.base, source]


@contextlib.contextmanager
def _one_thread_each() -> Iterator[int]:
    """Make matmuls run on one thread, whose sums have one order; give how many there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _spectra(
    aligned: Aligned,
    chosen: Sequence[tuple[str, int]],
    seed: int,
    pool: ThreadPoolExecutor,
    bar: Progress | None,
) -> list[Spectrum]:
    """Return the spectra of ``chosen``; each is the work of one thread."""

    def one(item: tuple[str, int]) -> Spectrum:
        name, model = item
        sources = _with_base(aligned, model)
        operands = [source.operand(name) for source in sources]
        spectrum = spectrum_of(
            name,
            kind_of(name),
            layer_of(name),
            model,
            (operands[0] if aligned.base is not None else None, operands[-1]),
            seed=seed,
            chunk_elements=CHUNK_ELEMENTS,
        )
        if bar is not None:
            bar.update(_nbytes(sources, name) * PASSES)
        return spectrum

    return list(pool.map(one, chosen))
