"""Look before you merge: how models differ from their base and from each other.

    mergeme inspect ./medicine ./code --base ./base --html inspection.html

prints, per kind of module, the cosine between the models' task vectors (their weights minus the
base's), how often they disagree in sign, how far they moved from the base and how much they left
unchanged; then the layers that stand out. The page adds drawings by layer and the top singular
values of a sample of matrices; it is one file and opens without network. The JSON holds all of it
for every tensor.

Without --base the weights themselves are compared, which says less: fine-tuned models are always
near each other. Models are folders with safetensors; they are read once as a stream.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from mergeme_ext.cli._output import byte_bar, set_threads
from mergeme_ext.inspection import inspect_models
from mergeme_ext.report.inspection import inspection_page, inspection_text

__all__ = ["HELP", "add_arguments", "run"]

HELP = "show how models differ before merging them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="folders of the models to compare"
    )
    parser.add_argument(
        "--base", type=Path, metavar="BASE", help="folder of the model they were fine-tuned from"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with tables and drawings"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write every figure; - prints it instead of the tables"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="matrices of each module kind whose singular values are taken, 0 for none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="chooses these (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads to use (default: torch's choice)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    set_threads(args)
    to_screen = args.json == "-"
    json_file = None if args.json is None or to_screen else Path(args.json)
    for file in (args.html, json_file):
        if file is not None:
            _check_free(file, overwrite=args.overwrite)
    inspection = inspect_models(
        args.models,
        args.base,
        samples=args.samples,
        seed=args.seed,
        progress=byte_bar("inspect", quiet=args.quiet),
    )
    text = json.dumps(inspection.document(), indent=1, allow_nan=False) + "\n"
    if json_file is not None:
        _write(json_file, text)
    if args.html is not None:
        _write(args.html, inspection_page(inspection))
    if to_screen:
        sys.stdout.write(text)
    elif not args.quiet:
        print(inspection_text(inspection))


def _check_free(file: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot be written, before the long part of the work."""
    if file.is_dir():
        raise IsADirectoryError(f"{file}: is a folder; name a file")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: expected a folder to write {file.name} to")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file}: exists; overwriting must be asked for")


def _write(file: Path, text: str) -> None:
    """Write ``file`` so that it appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
