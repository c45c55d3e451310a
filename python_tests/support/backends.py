"""The ways a test can run an op.

cpu, the CPU code; simt, the CUDA code compiled for the host; ptx80 and ptx90, what nvcc made of it
for sm_80 and sm_90a in an interpreter; cuda, on a GPU.
"""

import importlib
import pkgutil

import pytest
import torch

import mergeme_ext.ops
from mergeme_ext import _simt
from python_tests.support import ptx

# Fakes and backwards live beside the wrappers; give them to the test module's ops too.
for module in pkgutil.iter_modules(mergeme_ext.ops.__path__):
    for namespace in ("mergeme_simt", "mergeme_ptx80", "mergeme_ptx90"):
        importlib.import_module(f"mergeme_ext.ops.{module.name}").register(namespace)


class Backend:
    def __init__(self, name, namespace, device):
        self.name, self.namespace, self.device = name, namespace, device
        self.emulated = namespace != "mergeme"  # slow: fit for small cases only
        # A hundred times as slow again: gradcheck then tries a few directions (fast_mode), where
        # elsewhere it tries every element.
        self.interpreted = namespace.startswith("mergeme_ptx")

    def op(self, op):
        return getattr(getattr(torch.ops, self.namespace), op).default

    def __repr__(self):
        return self.name


CPU = Backend("cpu", "mergeme", "cpu")
SIMT = Backend("simt", "mergeme_simt", "cpu")
PTX80 = Backend("ptx80", "mergeme_ptx80", "cpu")
PTX90 = Backend("ptx90", "mergeme_ptx90", "cpu")
CUDA = Backend("cuda", "mergeme", "cuda")


def _ptx(backend, *values):
    architecture = ptx.ARCHITECTURES[backend.name]
    missing = pytest.mark.skipif(
        not ptx.built_ops(architecture),
        reason=f"no PTX for {architecture}: build with MERGEME_SIMT=1 where nvcc is found",
    )
    return pytest.param(backend, *values, id=backend.name, marks=missing)


PTX_BACKENDS = [_ptx(PTX80), _ptx(PTX90)]
EMULATED = [pytest.param(SIMT, id="simt"), *PTX_BACKENDS]
NO_GPU = [pytest.param(CPU, id="cpu"), *EMULATED]
BACKENDS = [
    *NO_GPU,
    pytest.param(
        CUDA,
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def backends_with_errors(cpu):
    """Backends without a GPU, each with what a value that only a kernel sees makes it raise."""
    return [
        pytest.param(CPU, cpu, id="cpu"),
        pytest.param(SIMT, RuntimeError, id="simt"),
        *(_ptx(backend, RuntimeError) for backend in (PTX80, PTX90)),
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
