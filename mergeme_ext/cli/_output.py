"""What the commands that follow a recipe and write a checkpoint share."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from mergeme_ext.assembly import MoEPlan
from mergeme_ext.merging import MergePlan
from mergeme_ext.merging.engine import CHUNK_ELEMENTS

__all__ = ["add_output_arguments", "carry_out", "set_threads"]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that writes a checkpoint as a recipe says."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="the YAML recipe")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make for the result")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it is a checkpoint already; the old one stays until the new is whole",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="split the weights into files of at most this size (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk-elements",
        type=int,
        default=CHUNK_ELEMENTS,
        metavar="N",
        help="weights merged at a time; lower it to save memory, the result stays the same "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads to use (default: torch's choice)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be written, stop"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def set_threads(args: argparse.Namespace) -> None:
    """Obey ``--threads``.

    Raises:
        ValueError: It is below 1.
    """
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"expected --threads of at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)


def carry_out(
    plan: MergePlan | MoEPlan, args: argparse.Namespace, *, label: str, would: str, contents: str
) -> None:
    """Write what ``plan`` holds and say so; with ``--dry-run``, say what it would be.

    Args:
        plan: Its inputs are checked.
        args: Hold what ``add_output_arguments`` asks for.
        label: Stands before the progress bar.
        would: Ends in what ``contents`` completes, such as "ties would write".
        contents: Number of tensors and bytes.
    """
    if args.dry_run:
        if not args.quiet:
            print(f"{args.recipe}: all inputs fit; {would} {contents}")
        return
    begin = time.perf_counter()
    plan.run(
        args.out,
        chunk_elements=args.chunk_elements,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        progress=byte_bar(label, quiet=args.quiet),
    )
    if not args.quiet:
        print(f"{os.fspath(args.out)}: {contents} in {time.perf_counter() - begin:.1f} s")


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
