"""Settings for every test: quiet threads, no network, repeatable randomness."""

import os

# Busy-waiting OpenMP threads make torch many times slower when test workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
