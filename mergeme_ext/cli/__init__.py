"""The command ``mergeme``: one module per command, arguments in, one call, messages out."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mergeme_ext._load import _C
from mergeme_ext._version import __version__
from mergeme_ext.integrations.model_check import WouldNotLoad

__all__ = ["main"]

# Each module defines HELP, add_arguments(parser) and run(args).
COMMANDS = (
    "merge",
    "moe",
    "inspect",
    "info",
    "demo",
)

# Exit codes: the user can mend it; the user stopped it.
USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 after one line of error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="mergeme",
        description="Merge fine-tuned LLM checkpoints; build Mixture-of-Experts models of them.",
        epilog="Run 'mergeme COMMAND --help' for what a command takes, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"mergeme_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"mergeme_ext.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--traceback", action="store_true", help="on an error, show where it was raised"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    _C.report_bus_errors(exit_code=USER_ERROR)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        what = getattr(args, "when_stopped", "nothing was written")
        print(f"mergeme {args.command}: stopped; {what}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, NotImplementedError, ImportError, WouldNotLoad) as error:
        if args.traceback:
            raise
        print(f"mergeme {args.command}: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
