"""What the commands that follow a recipe and write a checkpoint share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergeme_ext.io import parse_size
from mergeme_ext.merging.execution import Execution

__all__ = [
    "add_execution_arguments",
    "add_output_arguments",
    "byte_bar",
    "execution_of",
    "set_threads",
]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that writes a checkpoint as a recipe says."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="the YAML recipe")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make for the result")
    parser.add_argument(
        "--force",
        "--overwrite",
        action="store_true",
        help="replace OUT if it is a checkpoint already; the old one stays until the new is whole",
    )
    parser.add_argument(
        "--max-shard-size",
        "--out-shard-size",
        default="5GB",
        metavar="SIZE",
        help="split the weights into files of at most this size (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, stop"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that change how the work is done, but no bit of the result."""
    parser.add_argument(
        "--threads",
        "-j",
        "--num-threads",
        type=int,
        metavar="N",
        help="CPU threads to use (default: torch's choice)",
    )
    parser.add_argument(
        "--max-memory",
        default="1GiB",
        metavar="SIZE",
        help="memory for tensors at most, whatever their size (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk-elements",
        type=int,
        metavar="N",
        help="weights merged at a time (default: what fits the cache and the memory)",
    )


def set_threads(args: argparse.Namespace) -> None:
    """Obey ``--threads``.

    Raises:
        ValueError: It is below 1.
    """
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"expected threads of at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)


def execution_of(args: argparse.Namespace, **rest: Any) -> Execution:
    """Return what ``add_execution_arguments``' arguments ask for.

    Raises:
        ValueError: A number or size makes no sense.
    """
    return Execution(
        threads=args.threads,
        max_memory=parse_size(args.max_memory),
        chunk_elements=args.chunk_elements,
        **rest,
    )


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
