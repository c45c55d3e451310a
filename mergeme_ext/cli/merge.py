"""Merge checkpoints into one, as a recipe says.

A recipe is a YAML file; those written for mergekit work as they are:

    merge_method: ties
    base_model: ./base             # folders with safetensors, config.json and a tokenizer
    models:
      - model: ./math
        parameters: {weight: 1.0, density: 0.8}
      - model: ./code+./adapter    # with a LoRA adapter applied
        parameters:
          density: 0.8
          weight:                  # lists run over the layers; filters are parts of tensor names
            - {filter: mlp, value: [0.2, 0.8]}
            - value: 0.5
    parameters: {lambda: 1/n}      # for the whole merge; 1/n is one over the number of models
    dtype: bfloat16                # of the result; the base's if left out
    tokenizer: {source: union}     # the base's tokenizer if left out

Also: slices with layer ranges, modules, chat_template, several documents in one file.
'mergeme info --methods' lists the merge methods with their parameters.

Everything is checked first: what is misspelt is named with its line, and no file is written until
all models are known to fit. OUT appears when it is complete, or not at all; a merge that was
stopped goes on with --resume. OUT/mergeme_report.json says what became of every input tensor.

Several processes share the work when torchrun starts them:
    torchrun --nproc-per-node 4 -m mergeme_ext merge RECIPE OUT
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from mergeme_ext.cli._output import (
    add_execution_arguments,
    add_output_arguments,
    byte_bar,
    execution_of,
)
from mergeme_ext.integrations.model_check import ModelCheck, WouldNotLoad
from mergeme_ext.io import format_size
from mergeme_ext.merging import MergeSpec, load_merge_specs
from mergeme_ext.merging.engine import Allowances, MergePlan, plan_documents
from mergeme_ext.merging.preview import measure, preview
from mergeme_ext.merging.ranks import Alone, Ranks, join_ranks

__all__ = ["HELP", "add_arguments", "run"]

HELP = "merge checkpoints into one"

# mergekit-yaml's flags that have nothing to act on here: with an argument, and without.
_WITHOUT_EFFECT = ("--lora-merge-cache", "--lora-merge-dtype", "--transformers-cache")
_WITHOUT_EFFECT += ("--write-threads",)
_SWITCHES_WITHOUT_EFFECT = ("lazy-unpickle", "low-cpu-memory", "read-to-gpu", "multi-gpu")
_SWITCHES_WITHOUT_EFFECT += ("async-write", "clone-tensors", "safe-serialization")
_SWITCHES_WITHOUT_EFFECT += ("trust-remote-code", "verbose")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    add_output_arguments(parser)
    add_execution_arguments(parser)
    parser.set_defaults(when_stopped="the same command with --resume goes on from there")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a merge into OUT that was stopped"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="where to compute: cpu, cuda or cuda:N (default: %(default)s)",
    )
    parser.add_argument(
        "--cuda",
        "--gpu-rich",
        dest="device",
        action="store_const",
        const="cuda",
        help="the same as --device cuda",
    )
    parser.add_argument(
        "--random-seed",
        type=int,
        metavar="N",
        help="seed of methods that drop at random, if the recipe gives none",
    )
    parser.add_argument(
        "--allow-crimes", action="store_true", help="merge models of different kinds"
    )
    parser.add_argument(
        "--unsafe-truncate-embeddings",
        action="store_true",
        help="cut embeddings of different sizes to the smallest; better, give the recipe a "
        "tokenizer",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="let NaN and infinities in inputs through"
    )
    parser.add_argument(
        "--allow-leftover",
        action="append",
        default=[],
        metavar="PATTERN",
        help="let input tensors of such names stay out of the result, as in '*.inv_freq'; may be "
        "given again",
    )
    for flag, what in (
        ("copy-tokenizer", "write the base's tokenizer, or the merged one"),
        ("write-model-card", "write README.md"),
        ("model-check", "ask transformers, if it is installed, whether it would load the result"),
    ):
        parser.add_argument(
            f"--{flag}",
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"{what} (default: yes)",
        )
    for flag in _WITHOUT_EFFECT:
        parser.add_argument(flag, dest="without_effect", help=argparse.SUPPRESS)
    for word in _SWITCHES_WITHOUT_EFFECT:
        parser.add_argument(
            f"--{word}",
            f"--no-{word}",
            *(["-v"] if word == "verbose" else []),
            dest="without_effect",
            action="store_true",
            help=argparse.SUPPRESS,
        )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    execution = execution_of(args, device=args.device, allow_nonfinite=args.allow_nonfinite)
    specs = load_merge_specs(args.recipe)
    if args.random_seed is not None:
        specs = [spec.with_default_seed(args.random_seed) for spec in specs]
    allow = Allowances(
        crimes=args.allow_crimes,
        leftovers=args.allow_leftover,
        truncate_embeddings=args.unsafe_truncate_embeddings,
    )
    if args.dry_run:
        _preview(args, specs, allow, execution)
        return
    ranks = join_ranks()
    for plan, target in plan_documents(specs, args.out, allow=allow):
        _carry_out(plan, target, args, execution, ranks)


def _preview(args, specs: list[MergeSpec], allow: Allowances, execution) -> None:
    for number, (plan, target) in enumerate(plan_documents(specs, args.out, allow=allow)):
        if not args.quiet:
            if len(specs) > 1:
                print(f"# document {number + 1} of {len(specs)}")
            print(preview(plan, execution, measure(plan, target, execution)))
        if len(specs) > 1:
            print("the other documents merge its result, so they can only be planned then")
            return


def _carry_out(
    plan: MergePlan, target: Path, args: argparse.Namespace, execution, ranks: Alone | Ranks
) -> None:
    begin = time.perf_counter()
    quiet = args.quiet or ranks.rank > 0
    if not quiet:
        for note in plan.layout.notes:
            print(f"mergeme merge: note: {note}", file=sys.stderr)
    with _checked(plan, wanted=args.model_check and ranks.rank == 0) as check:
        plan.run(
            target,
            execution=execution,
            max_shard_size=args.max_shard_size,
            overwrite=args.force,
            resume=args.resume,
            progress=byte_bar(plan.method.name, quiet=quiet),
            ranks=ranks,
            check=check,
            model_card=args.write_model_card,
            copy_tokenizer=args.copy_tokenizer,
        )
    if not quiet:
        contents = f"{len(plan.tensors)} tensors, {format_size(plan.total_bytes)}"
        print(f"{os.fspath(args.out)}: {contents} in {time.perf_counter() - begin:.1f} s")


@contextlib.contextmanager
def _checked(plan: MergePlan, *, wanted: bool):
    """Give what raises if transformers would not load the result; asks it in the meantime."""
    if not wanted:
        yield None
        return
    question = ModelCheck(plan.config, [(t.name, t.shape) for t in plan.tensors])

    def check() -> None:
        if problems := question.problems():
            raise WouldNotLoad(
                f"transformers would not load the result as {plan.config['architectures'][0]}: "
                f"{'; '.join(problems)} (the same command with --resume --no-model-check writes "
                "it all the same)"
            )

    try:
        yield check
    finally:
        question.cancel()
