"""Print what a bug report needs: versions, CUDA architectures built, CPU features in use."""

import argparse
import platform

import torch

from mergeme_ext._load import _C
from mergeme_ext._version import __version__
from mergeme_ext.merging import names

__all__ = ["HELP", "add_arguments", "run"]

HELP = "print versions, CUDA architectures built and CPU features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``: none."""


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
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
