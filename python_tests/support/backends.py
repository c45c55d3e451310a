"""The ways a test can run an op: CPU code, CUDA code on the host shim, CUDA code on a GPU."""

import importlib
import pkgutil

import pytest
import torch

import mergeme_ext.ops
from mergeme_ext import _simt

# Fakes and backwards live beside the wrappers; give them to the shim's ops too.
for module in pkgutil.iter_modules(mergeme_ext.ops.__path__):
    importlib.import_module(f"mergeme_ext.ops.{module.name}").register("mergeme_simt")


class Backend:
    def __init__(self, name, namespace, device):
        self.name, self.namespace, self.device = name, namespace, device

    def op(self, op):
        return getattr(getattr(torch.ops, self.namespace), op).default

    def __repr__(self):
        return self.name


CPU = Backend("cpu", "mergeme", "cpu")
SIMT = Backend("simt", "mergeme_simt", "cpu")
CUDA = Backend("cuda", "mergeme", "cuda")

BACKENDS = [
    pytest.param(CPU, id="cpu"),
    pytest.param(SIMT, id="simt"),
    pytest.param(
        CUDA,
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


class Schedule:
    """Runs the shim's threads in another order; a result that changes with it has a race."""

    def __init__(self, kind):
        self.kind = kind

    def __enter__(self):
        _simt.set_schedule(self.kind, 1)

    def __exit__(self, *_):
        _simt.set_schedule(0, 0)


SCHEDULES = [pytest.param(Schedule(1), id="reverse"), pytest.param(Schedule(2), id="shuffled")]
