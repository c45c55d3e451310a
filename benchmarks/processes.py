"""Runs whole commands one at a time and says what each cost: wall and CPU time, peak memory."""

import contextlib
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "floor", "measure", "settle"]

POLL_SECONDS = 0.02
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Cost:
    """What a command took; ``peak_anonymous_bytes`` sums over its whole process tree."""

    wall_s: float
    user_s: float
    system_s: float
    peak_anonymous_bytes: int = 0
    returncode: int = 0
    message: str = ""

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def _anonymous_bytes(pid: int) -> int:
    """Memory that no file backs, of one process; 0 once it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{pid}/task/{thread}/children") as children,
            ):
                for child in children.read().split():
                    yield from _tree(int(child))


class _PeakMemory:
    """Watches a process tree from a thread until it is told to stop."""

    def __init__(self, pid: int):
        self.peak = 0
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.peak = max(self.peak, sum(map(_anonymous_bytes, _tree(self._pid))))

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self.peak


def measure(
    command: Sequence[str], *, cwd: str | Path, environment: Mapping[str, str] | None = None
) -> Cost:
    """Run ``command`` to its end; ``message`` holds the last line it wrote if it failed."""
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        memory = _PeakMemory(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            peak = memory.stop()
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        message = ""
        if process.returncode:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            message = lines[-1] if lines else "it printed nothing"
    return Cost(wall, usage.ru_utime, usage.ru_stime, peak, process.returncode, message)


def floor(inputs: Sequence[Path], output: Path, output_bytes: int) -> Cost:
    """Read ``inputs`` through, write ``output_bytes`` and sync them: less no merge can do."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as file:
        left = output_bytes
        while left > 0:
            left -= file.write(buffer[: min(left, BLOCK_BYTES)])
        os.fsync(file.fileno())
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Cost(wall, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)


def settle() -> None:
    """Let the system write what it still holds, so that the next command does not pay for it."""
    os.sync()
