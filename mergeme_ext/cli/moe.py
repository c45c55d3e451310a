"""Build a Mixture-of-Experts model of fine-tuned models, as a recipe says.

A recipe is a YAML file with the keys that mergekit-moe uses, and a few more:

    base_model: ./base             # folders with safetensors, config.json and a tokenizer
    experts:                       # LLaMA- or Mistral-shaped, tuned from the base
      - source_model: ./medicine
        positive_prompts: ["The patient presents with", "mg twice daily"]
      - source_model: ./code
        prompts_file: code.jsonl   # "text" of each line; or a .txt with one prompt per line
    experts_per_token: 2           # the default
    base_as_expert: false          # true: the base's MLPs as a last expert
    merge:                         # for all but the MLPs; a plain mean if left out
      method: ties                 # linear, task_arithmetic, ties, dare_linear, dare_ties
      parameters: {density: 0.8, lambda: 1/n, normalize: false}
    gate_mode: hidden              # hidden (rows from the prompts; the default), random, zero
    gate_scale: 4.0                # hidden: length of the rows; larger routes more sharply
    dtype: bfloat16                # of the result; the base's if left out
    seed: 0                        # of gate_mode random

More about gate_mode hidden: gate_input (router: what the router will read; residual: what enters
the layer), gate_pool (mean or last token), gate_center (true: keep what tells experts apart),
hidden_from (base or expert: which model runs on the prompts), prompt_tokens (512).
gate_input residual, gate_pool last, gate_center false and gate_scale 1 give mergekit-moe's hidden.

The result is a stock Mixtral checkpoint: MixtralForCausalLM.from_pretrained(OUT) loads it.
Everything is checked first: what is misspelt is named with its line, and no file is written until
all models are known to fit. OUT appears when it is complete, or not at all.
"""

import argparse
import os
import sys
import time
import warnings

from mergeme_ext.assembly import load_moe_spec, plan_moe
from mergeme_ext.cli._output import (
    add_execution_arguments,
    add_output_arguments,
    byte_bar,
    execution_of,
)
from mergeme_ext.io import format_size

__all__ = ["HELP", "add_arguments", "run"]

HELP = "build a Mixture-of-Experts model (Mixtral) of fine-tuned models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    add_output_arguments(parser)
    add_execution_arguments(parser)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"mergeme moe: note: {message}", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _run(args)


def _run(args: argparse.Namespace) -> None:
    execution = execution_of(args)
    plan = plan_moe(load_moe_spec(args.recipe))
    size = format_size(plan.total_bytes)
    contents = f"{len(plan.experts)} experts, {len(plan.tensors)} tensors, {size}"
    if args.dry_run:
        if not args.quiet:
            print(f"{args.recipe}: all inputs fit; the model would have {contents}")
        return
    begin = time.perf_counter()
    plan.run(
        args.out,
        execution=execution,
        max_shard_size=args.max_shard_size,
        overwrite=args.force,
        progress=byte_bar("moe", quiet=args.quiet),
    )
    if not args.quiet:
        print(f"{os.fspath(args.out)}: {contents} in {time.perf_counter() - begin:.1f} s")
