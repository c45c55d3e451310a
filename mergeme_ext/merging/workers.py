"""Shares work among threads: first what prepares a tensor, then the chunks it falls into."""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

__all__ = ["Job", "run_jobs"]

# A tensor this large is prepared by all threads together: nobody else could use them meanwhile.
_LARGE = 2**24


class Job(Protocol):
    """One tensor's work.

    Attributes:
        memory: Bytes it holds from ``start`` to ``finish``.
        numel: Elements of its tensor.
    """

    memory: int
    numel: int

    def start(self) -> Iterable[Callable[[], None]]:
        """Prepare, and return tasks that may run at once, in any order."""

    def finish(self) -> None:
        """Let go of everything; called once, when all tasks have run, or after an error."""


def run_jobs(jobs: Iterator[Job], *, threads: int, memory: int) -> None:
    """Run ``jobs`` on ``threads`` threads and return when all are done.

    A job starts when no task of an earlier one is waiting, and when its memory fits into
    ``memory`` together with that of the jobs under way (one alone always may). An exception in
    one thread stops the others after their tasks and is raised here, as is one that arrives here
    meanwhile, such as KeyboardInterrupt.
    """
    pool = _Pool(jobs, threads, memory)
    intra_op = torch.get_num_threads()
    workers = [threading.Thread(target=pool.work, name=f"merge-{i}") for i in range(threads)]
    try:
        torch.set_num_threads(1)  # new threads take this over
        for worker in workers:
            worker.start()
        # Not by join: an interrupted join takes its thread for ended (CPython 3.11).
        while not pool.ended.wait(0.1):  # short, so that a signal is seen
            pass
    except BaseException as error:
        pool.stop(error)
        raise
    finally:
        with _undisturbed():
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            pool.finish_all()
            torch.set_num_threads(intra_op)
    if pool.error is not None:
        raise pool.error


@contextlib.contextmanager
def _undisturbed():
    """Let further Ctrl-C pass by: the threads are stopping already.

    A thread that still ran when the interpreter ends would bring the process down.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Running:
    def __init__(self, job: Job):
        self.job, self.open = job, 1  # tasks not yet done; starting is one


class _Pool:
    def __init__(self, jobs: Iterator[Job], threads: int, memory: int):
        self._jobs, self._threads, self._memory = jobs, threads, memory
        self._changed = threading.Condition()
        self._tasks: deque[tuple[_Running, Callable[[], None]]] = deque()
        self._running: list[_Running] = []
        self._next: Job | None = None
        self._drawing = False  # a thread is in next(jobs), which may take long
        self._exhausted = False
        self._at_work = threads
        self.ended = threading.Event()  # no thread is at work any more
        self.error: BaseException | None = None

    def stop(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def finish_all(self) -> None:
        for running in self._running:
            running.job.finish()
        self._running = []

    def work(self) -> None:
        try:
            with torch.inference_mode():
                while (step := self._take()) is not None:
                    step()
        except BaseException as error:  # handed to the thread that waits for this one
            self.stop(error)
        finally:
            with self._changed:
                self._at_work -= 1
                if self._at_work == 0:
                    self.ended.set()

    def _take(self) -> Callable[[], None] | None:
        """Wait for something to do; None when there is nothing more."""
        with self._changed:
            while self.error is None:
                if self._tasks:
                    running, task = self._tasks.popleft()
                    return lambda: self._run(running, task)
                if self._next is not None and self._fits(self._next):
                    running = _Running(self._next)
                    self._next = None
                    self._running.append(running)
                    return lambda: self._start(running)
                if self._next is None and not self._exhausted and not self._drawing:
                    self._drawing = True
                    return self._draw
                if self._exhausted and self._next is None and not self._running:
                    return None
                self._changed.wait()
        return None

    def _draw(self) -> None:
        job = next(self._jobs, None)
        with self._changed:
            self._next, self._drawing = job, False
            self._exhausted = job is None
            self._changed.notify_all()

    def _fits(self, job: Job) -> bool:
        held = sum(running.job.memory for running in self._running)
        return held == 0 or held + job.memory <= self._memory

    def _start(self, running: _Running) -> None:
        large = running.job.numel >= _LARGE and self._threads > 1
        if large:
            torch.set_num_threads(self._threads)
        try:
            tasks = list(running.job.start())
        finally:
            if large:
                torch.set_num_threads(1)
        with self._changed:
            running.open += len(tasks)
            self._tasks.extend((running, task) for task in tasks)
        self._done(running)

    def _run(self, running: _Running, task: Callable[[], None]) -> None:
        task()
        self._done(running)

    def _done(self, running: _Running) -> None:
        with self._changed:
            running.open -= 1
            last = running.open == 0 and running in self._running
            if last:
                self._running.remove(running)
            self._changed.notify_all()
        if last:
            running.job.finish()
