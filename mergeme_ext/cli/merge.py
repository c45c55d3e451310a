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

from mergeme_ext.cli._output import add_output_arguments, carry_out, set_threads
from mergeme_ext.io import format_size
from mergeme_ext.merging import load_merge_spec, plan_merge

__all__ = ["HELP", "add_arguments", "run"]

HELP = "merge checkpoints into one of the same architecture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    set_threads(args)
    plan = plan_merge(load_merge_spec(args.recipe))
    contents = f"{len(plan.tensors)} tensors, {format_size(plan.total_bytes)}"
    name = plan.method.name
    carry_out(plan, args, label=name, would=f"{name} would write", contents=contents)
