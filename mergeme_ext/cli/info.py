"""Print what a bug report needs: versions, CUDA architectures built, CPU features in use.

With --methods: the merge methods, and the parameters that recipes give them.
"""

import argparse
import inspect
import platform

import torch

from mergeme_ext._load import _C
from mergeme_ext._version import __version__
from mergeme_ext.merging import names
from mergeme_ext.merging.registry import MergeMethod, all_methods

__all__ = ["HELP", "add_arguments", "run"]

HELP = "print versions, CUDA architectures built and CPU features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    parser.add_argument(
        "--methods", action="store_true", help="list the merge methods and their parameters"
    )


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.methods:
        print("\n".join(describe(method) for method in all_methods()))
        return
    build = _C.build_info()
    cuda = build["cuda_architectures"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    rows = {
        "mergeme_ext": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "CUDA kernels": "not built" if cuda is None else f"built for {cuda}",
        "CUDA device": device,
        "CPU code": f"{build['cpu_chosen']} (of {_words(build['cpu_available'])})",
        "CPU threads": torch.get_num_threads(),
        "merge methods": _words(names()),
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")


def describe(method: MergeMethod) -> str:
    """Return a few lines on ``method``: what it does, what it needs, what can be set."""
    least, most = method.num_models
    models = f"{least}" if least == most else f"{least} or more"
    base = "a base and " if method.needs_base else "a base if given, and " * method.takes_base
    summary = inspect.getdoc(method.function).splitlines()[0]
    lines = [f"{method.name}: {summary}", f"    {method.paper}; {base}models: {models}"]
    for parameter in method.parameters.values():
        value = "needed" if parameter.required else f"{_plain(parameter.default)}"
        each = ", of each model" if parameter.kind.per_model else ""
        lines.append(f"    {parameter.kind.key}: {value}{each}")
    if method.statistics is not None:
        lines.append(f"    {method.statistics}: a folder, of each model")
    return "\n".join(lines)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
