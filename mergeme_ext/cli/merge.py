"""Merge checkpoints into one of the same architecture, as a recipe says.

A recipe is a YAML file with the keys that mergekit uses:

    merge_method: ties             # linear, task_arithmetic, ties, dare_linear, dare_ties
    base_model: ./base             # folders with safetensors, config.json and a tokenizer
    models:
      - model: ./math
        parameters: {weight: 1.0, density: 0.8}
      - model: ./code
        parameters: {weight: 0.5, density: 0.8}
    parameters: {lambda: 1/n}      # for the whole merge; 1/n is one over the number of models
    dtype: bfloat16                # of the result; the base's if left out

Everything is checked first: what is misspelt is named with its line, and no file is written until
all models are known to fit. OUT appears when it is complete, or not at all.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from mergeme_ext.cli._progress import byte_bar
from mergeme_ext.io import format_size
from mergeme_ext.merging import load_merge_spec, plan_merge
from mergeme_ext.merging.engine import CHUNK_ELEMENTS

__all__ = ["HELP", "add_arguments", "run"]

HELP = "merge checkpoints into one of the same architecture"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that writes a checkpoint."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="the YAML recipe")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make for the result")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    set_threads(args)
    plan = plan_merge(load_merge_spec(args.recipe))
    size = f"{len(plan.tensors)} tensors, {format_size(plan.total_bytes)}"
    if args.dry_run:
        if not args.quiet:
            print(f"{args.recipe}: all inputs fit; {plan.method.name} would write {size}")
        return
    begin = time.perf_counter()
    plan.run(
        args.out,
        chunk_elements=args.chunk_elements,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        progress=byte_bar(plan.method.name, quiet=args.quiet),
    )
    if not args.quiet:
        print(f"{os.fspath(args.out)}: {size} in {time.perf_counter() - begin:.1f} s")
