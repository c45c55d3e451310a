"""Settings for every test: quiet threads, no network, repeatable randomness."""

import importlib.util
import os
import sys

# Busy-waiting OpenMP threads make torch many times slower when test workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

import mergeme_ext

# Tests the shim of another build than the one in the package: one with a sanitizer in it, see
# python_tests/simt/test_sanitizers.py.
if path := os.environ.get("MERGEME_SIMT_MODULE"):
    spec = importlib.util.spec_from_file_location("mergeme_ext._simt", path)
    mergeme_ext._simt = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mergeme_ext._simt)

settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("house")


def pytest_sessionstart():
    """Runs tile instructions in software for a test run with ``MERGEME_CPU_ISA=amx``.

    Later than pytest's own handler of illegal instructions, which would report them. A processor
    that has tiles goes on running them itself.
    """
    if os.environ.get("MERGEME_CPU_ISA") == "amx":
        from mergeme_ext import _simt

        _simt.emulate_amx()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
