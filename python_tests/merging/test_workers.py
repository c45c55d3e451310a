"""Threads share jobs: everything runs once, memory is kept to, errors stop all of them."""

import threading
import time

import pytest
import torch

from mergeme_ext.merging.workers import run_jobs


class Job:
    def __init__(self, log, name, tasks=3, memory=0, fail=None, numel=1):
        self.log, self.name, self.count, self.memory = log, name, tasks, memory
        self.fail, self.numel = fail, numel

    def start(self):
        self.log.append(("start", self.name))
        self.threads = torch.get_num_threads()
        return [lambda i=i: self.task(i) for i in range(self.count)]

    def task(self, i):
        if self.fail is not None and i == 1:
            raise self.fail
        time.sleep(0.001)
        self.log.append((self.name, i))

    def finish(self):
        self.log.append(("finish", self.name))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_everything_runs_once(threads):
    log = []
    jobs = [Job(log, n, tasks=n % 4) for n in range(20)]
    run_jobs(iter(jobs), threads=threads, memory=0)
    expected = [(what, n) for n in range(20) for what in ("start", "finish")]
    expected += [(n, i) for n in range(20) for i in range(n % 4)]
    assert sorted(log, key=str) == sorted(expected, key=str)
    for n in range(20):
        order = [entry for entry in log if n in entry[:1] or entry[1:] == (n,)]
        assert order.index(("start", n)) == 0


def test_memory_is_kept_to():
    held, most, lock = [0], [0], threading.Lock()

    class Holding(Job):
        def start(self):
            with lock:
                held[0] += self.memory
                most[0] = max(most[0], held[0])
            return super().start()

        def finish(self):
            super().finish()
            with lock:
                held[0] -= self.memory

    run_jobs(iter([Holding([], n, memory=40) for n in range(12)]), threads=6, memory=100)
    assert most[0] <= 80 and held[0] == 0
    run_jobs(iter([Holding([], n, memory=400) for n in range(3)]), threads=6, memory=100)
    assert held[0] == 0  # each is too large, so each ran alone


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_stops_all_and_frees_all(threads):
    log = []
    jobs = [Job(log, n, fail=ValueError("bad") if n == 2 else None) for n in range(50)]
    with pytest.raises(ValueError, match="bad"):
        run_jobs(iter(jobs), threads=threads, memory=0)
    started = {n for what, n in log if what == "start"}
    assert {n for what, n in log if what == "finish"} == started
    assert len(started) < 50


def test_an_error_while_drawing_is_raised():
    def jobs():
        yield Job([], 0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run_jobs(jobs(), threads=2, memory=0)


def test_torch_threads_are_restored():
    before = torch.get_num_threads()
    small, large = Job([], 0), Job([], 1, numel=2**25)
    run_jobs(iter([small, large]), threads=2, memory=0)
    assert torch.get_num_threads() == before
    assert (small.threads, large.threads) == (1, 2)
