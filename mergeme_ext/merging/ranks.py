"""Several processes at one merge: who takes which tensor, who waits for whom."""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Alone", "Ranks", "join_ranks"]

_POLL_SECONDS = 0.2


class Alone:
    """The one process of an ordinary merge."""

    rank, size, restarted = 0, 1, False

    def begin(self) -> None:
        """Say that another merge begins."""

    def draw(self, count: int) -> Iterator[int]:
        """Yield the numbers below ``count`` that this process is to work on."""
        return iter(range(count))

    def arrive(self, point: str) -> None:
        """Say that this process is at ``point``."""

    def wait(self, point: str, processes: int) -> None:
        """Wait until ``processes`` have arrived at ``point``."""

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what rank 0's ``make`` returned, which JSON can hold."""
        return make()


class Ranks:
    """This process among those that torchrun started, through torch.distributed's store.

    Args:
        store: The store that all of them see. It may outlive a process that died.
        rank: Of this process, from 0.
        size: How many there are.
        restarts: How often torchrun has started them again, because one had died.
    """

    def __init__(self, store: Any, rank: int, size: int, restarts: int = 0):
        self._store, self.rank, self.size = store, rank, size
        self._restarts, self._merge = restarts, 0

    @property
    def restarted(self) -> bool:
        """Whether these processes go on where others were stopped."""
        return self._restarts > 0

    def begin(self) -> None:
        """Say that another merge begins: nothing that was said of an earlier one counts."""
        self._merge += 1

    def _key(self, name: str) -> str:
        return f"mergeme/{self._restarts}/{self._merge}/{name}"

    def draw(self, count: int) -> Iterator[int]:
        """Yield numbers below ``count``; every one goes to exactly one process."""
        while (number := self._store.add(self._key("drawn"), 1) - 1) < count:
            yield number

    def arrive(self, point: str) -> None:
        """Say that this process is at ``point``."""
        self._store.add(self._key(f"at/{point}"), 1)

    def wait(self, point: str, processes: int) -> None:
        """Wait, for hours if need be, until ``processes`` have arrived at ``point``."""
        while self._store.add(self._key(f"at/{point}"), 0) < processes:
            time.sleep(_POLL_SECONDS)

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what rank 0's ``make`` returned, which JSON can hold."""
        key = self._key(f"shared/{name}")
        if self.rank == 0:
            value = make()
            self._store.set(key, json.dumps(value))
            self.arrive(f"shared/{name}")
            return value
        self.wait(f"shared/{name}", 1)
        return json.loads(self._store.get(key))


def join_ranks() -> Alone | Ranks:
    """Return this process's place among those of torchrun; alone if nothing started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Alone()
    import torch.distributed

    store, rank, size = next(torch.distributed.rendezvous("env://"))
    return Ranks(store, rank, size, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
