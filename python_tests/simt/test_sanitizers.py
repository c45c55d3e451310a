"""That a sanitizer built into the shim sees what it should; skipped on an ordinary build.

A shim with one (``undefined`` or ``address``) is built apart from the package, and its tests and
every op's are run on it; from the root of the repository::

    s=undefined
    MERGEME_CUDA=0 MERGEME_SIMT=1 MERGEME_CMAKE_ARGS=-DMERGEME_SANITIZE=$s \
        python setup.py build_ext --build-temp build/$s --build-lib build/$s/lib
    MERGEME_SIMT_MODULE=$(echo build/$s/lib/mergeme_ext/_simt.*.so) \
        python -m pytest -q python_tests/simt python_tests/ops -k simt -m "not slow"

AddressSanitizer must be loaded before Python, and the C++ library with it; leaks, which would be
Python's own, are not looked for. So for ``s=address`` the last command is preceded by::

    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) \
        $(g++ -print-file-name=libstdc++.so)"
"""

import subprocess
import sys
from pathlib import Path

import pytest

from mergeme_ext import _simt

ROOT = Path(__file__).parents[2]


CODE = """
import numpy as np
import python_tests.conftest
from python_tests.simt.support import run
run({})
"""


def run_apart(arguments):
    """Runs a kernel in a process of its own, which the sanitizer ends; returns what it reported."""
    command = [sys.executable, "-c", CODE.format(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.skipif(_simt.sanitizer != "address", reason="needs a shim with AddressSanitizer")
@pytest.mark.parametrize(
    "arguments, kind",
    [
        ("'bad_global_store', out=((31,), np.uint8), n=0", "heap-buffer-overflow"),
        ("'bad_shared_store', n=100, shared=100", "use-after-poison"),
        ("'bad_dangling', out=((64,), np.uint32), shared=1024", "stack-use-after-scope"),
    ],
)
def test_address_sanitizer_names_the_line(arguments, kind):
    code, report = run_apart(arguments)
    assert code != 0 and f"AddressSanitizer: {kind}" in report, report
    assert "test_kernels.cuh:" in report


@pytest.mark.skipif(_simt.sanitizer != "undefined", reason="needs a shim with UBSan")
@pytest.mark.parametrize(
    "arguments, kind",
    [
        ("'bad_overflow', out=((1,), np.int32), n=2**31 - 1", "signed integer overflow"),
        ("'bad_alignment', out=((8,), np.uint32)", "store to misaligned address"),
    ],
)
def test_undefined_behaviour_sanitizer_names_the_line(arguments, kind):
    code, report = run_apart(arguments)
    assert code != 0 and f"runtime error: {kind}" in report, report
    assert "test_kernels.cuh:" in report
