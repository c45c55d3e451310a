"""Several processes on this machine as the ranks of one gloo group."""

import multiprocessing
import pickle
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 60


@dataclass
class Failure:
    """An exception on a rank."""

    kind: str
    message: str
    trace: str


class Ranks:
    """Starts ``world_size`` processes; ``run`` calls one function on all of them at once."""

    def __init__(self, world_size, folder):
        self.world_size = world_size
        # One process imports torch, before it has any thread, and the ranks are forks of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mergeme_ext", "torch.distributed"])
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (there, rank, world_size, f"file://{folder}/store")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def try_run(self, function, per_rank):
        """Return what ``function(*per_rank[rank])`` gives, or a Failure, for each rank.

        ``function`` is at the top level of a module, so that the processes can import it.
        """
        for pipe, arguments in zip(self.pipes, per_rank, strict=True):
            # Plain pickle: multiprocessing's own would share the tensors' memory.
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s")
            results.append(pickle.loads(pipe.recv_bytes()))
        return results

    def run(self, function, per_rank):
        """Return what ``function(*per_rank[rank])`` gives for each rank."""
        results = self.try_run(function, per_rank)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), f"rank {rank}: {result.trace}"
        return results

    def close(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(pipe, rank, world_size, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS / 2),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception as error:
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))
