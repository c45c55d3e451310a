"""What nvcc makes of an op's launch.cu, as PTX."""

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from benchmarks.sass import FLAGS, MissingToolError, find_nvcc

ROOT = Path(__file__).parents[2]


@cache
def ptx_of(op: str, arch: str) -> str:
    """The PTX of csrc/ops/<op>/launch.cu for an architecture ("80", "90a"), with line numbers."""
    try:
        nvcc = find_nvcc()
    except MissingToolError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.ptx")
        source = f"csrc/ops/{op}/launch.cu"
        command = [nvcc, *FLAGS, "-I.", "-ptx", "-lineinfo", f"-arch=sm_{arch}", "-o", out, source]
        subprocess.run(command, cwd=ROOT, check=True)
        return Path(out).read_text()
