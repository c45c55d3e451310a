"""Runs a contender in a process of its own: what ends that process is told, not suffered."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts_contenders import Contender, Missing, find
from benchmarks.moe_cases import SHAPES, Case, make_inputs, make_weights, some_rows

__all__ = ["Local", "Remote", "runner"]

# A process that says nothing for this long hangs; loading the largest weights takes a minute.
ANSWER_SECONDS = 300
# Left to everything else when weights are loaded.
SPARE_BYTES = 1 << 30


class Local:
    """Loads, checks and times one contender here.

    Args:
        make: Makes the contender that does the work; called anew for other weights.
        weights_of: Gives a shape's weights in a dtype; may keep the last ones.
    """

    def __init__(self, make: Callable[[], Contender], weights_of: Callable) -> None:
        self._make, self._weights_of = make, weights_of
        self._contender = make()
        self._loaded: tuple | None = None
        self._call: Callable[[], Any] | None = None

    def prepare(self, case: Case) -> str:
        """Get ready for ``case``; return the variant of the contender that will run.

        Raises:
            Missing: It cannot.
        """
        torch.set_num_threads(case.threads)
        self._contender.refuse(case)
        key = (case.shape, case.dtype, case.threads)
        shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
        if self._loaded != key:
            self.release()
            check_memory(self._contender.copies * shape.weights * dtype.itemsize)
            self._contender.load(self._weights_of(shape, dtype), case.threads)
            self._loaded = key
        inputs = make_inputs(shape, dtype, case.routing, case.tokens)
        make = self._contender.forward if case.mode == "forward" else self._contender.training
        self._call = make(inputs)
        return self._contender.variant

    def first(self, sample: list[int], expert: int) -> tuple[float, list]:
        """Run the call once; return its seconds and the part of its results that is checked.

        Of forward, the tokens of ``sample``; of training, the gradients of these tokens, of some
        rows of the two weights of ``expert``, and of the tokens' mixing weights.
        """
        started = time.perf_counter()
        results = self._call()
        seconds = time.perf_counter() - started
        if isinstance(results, tuple):
            x, gate_up, down, mix = results
            parts = [x[sample], some_rows(gate_up[expert]), some_rows(down[expert]), mix[sample]]
        else:
            parts = [results[sample]]
        return seconds, [part.detach().float().numpy() for part in parts]

    def time(self) -> float:
        """Run the call once; return its seconds."""
        started = time.perf_counter()
        self._call()
        return time.perf_counter() - started

    def release(self) -> None:
        """Drop the weights and what was made of them."""
        self._loaded = self._call = None
        self._contender = self._make()

    close = release


class Remote:
    """The same, through a process that is started when first needed."""

    def __init__(self, name: str, peers: str | None) -> None:
        self._name, self._peers = name, peers
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._contender = find(name, peers)
        handle, log = tempfile.mkstemp(suffix=f".{name}.log")
        os.close(handle)
        self._log = Path(log)
        self._died: dict[tuple, tuple[int, str]] = {}
        self._case: Case | None = None

    def prepare(self, case: Case) -> str:
        self._contender.refuse(case)
        smallest, reason = self._died.get(_kind(case), (sys.maxsize, ""))
        if case.tokens >= smallest:
            raise Missing(reason)
        self._case = case
        return self._ask("prepare", case)

    def first(self, sample: list[int], expert: int) -> tuple[float, list]:
        return self._ask("first", sample, expert)

    def time(self) -> float:
        return self._ask("time")

    def _ask(self, method: str, *args: Any) -> Any:
        if self._process is None:
            self._start()
        try:
            self._pipe.send((method, args))
            if not self._pipe.poll(ANSWER_SECONDS):
                self._process.kill()
            kind, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            reason = self._reason()
            self._died[_kind(self._case)] = (self._case.tokens, reason)
            raise Missing(reason) from None
        if kind is not None:
            raise kind(answer)
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, self._name, self._peers, str(self._log)), daemon=True
        )
        self._process.start()
        other.close()

    def _reason(self) -> str:
        """How the process ended, and the last thing it said."""
        self._process.join()
        code = self._process.exitcode
        self._process = None
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = self._log.read_text(errors="replace").splitlines()
        said = [" ".join(line.replace("what():", "").split()) for line in lines if line.strip()]
        # An uncaught C++ exception is two lines, with a stack after it; else the last line counts.
        thrown = [i for i, line in enumerate(said) if line.startswith("terminate called")]
        said = said[thrown[0] : thrown[0] + 2] if thrown else said[-1:]
        end = f"ended its process with {end} at {self._case.tokens} tokens"
        return ": ".join([end, *said])

    def release(self) -> None:
        if self._process is not None:
            self._ask("release")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None
        self._log.unlink(missing_ok=True)


def check_memory(needed: int) -> None:
    """Raise RuntimeError where the system has less memory to give than ``needed`` bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if needed and needed > free - SPARE_BYTES:
        raise RuntimeError(
            f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        )


def _kind(case: Case) -> tuple:
    return case.shape, case.dtype, case.threads, case.routing


def _serve(pipe: Connection, name: str, peers: str | None, log: str) -> None:
    """The process's side: answer (method, arguments) until the pipe closes."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    local = Local(lambda: find(name, peers), make_weights)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = None, getattr(local, method)(*args)
        except Exception as error:
            kind = Missing if isinstance(error, Missing) else RuntimeError
            answer = kind, str(error) or repr(error)
        pipe.send(answer)


def runner(name: str, peers: str | None, weights_of: Callable) -> Local | Remote:
    """Return what runs the contender ``name``: here, or in a process where it has to be."""
    if find(name, peers).isolated:
        return Remote(name, peers)
    return Local(lambda: find(name, peers), weights_of)
