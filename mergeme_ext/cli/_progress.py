"""The progress bar of commands that write checkpoints."""

import sys
from collections.abc import Callable

from tqdm import tqdm

__all__ = ["byte_bar"]


def byte_bar(label: str, *, quiet: bool) -> Callable[[int], tqdm]:
    """Return a factory of bars that count bytes; silent if ``quiet`` or no one is watching."""

    def make(total: int) -> tqdm:
        return tqdm(
            total=total,
            desc=label,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=quiet or not sys.stderr.isatty(),
        )

    return make
