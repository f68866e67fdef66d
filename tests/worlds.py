"""Worlds of real gloo ranks that stay up and serve many cases."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


class World:
    """`size` processes in one process group; each runs what it is given and sends back what came of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(Path(self._folder.name) / "store"), theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; their results in order. Raises what a rank raised.

        After a failure the ranks may wait for each other: new ones take their places.
        """
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((function, arguments)))
            results = []
            for rank, pipe in enumerate(self._pipes):
                assert pipe.poll(TIMEOUT_S), f"rank {rank} of {self.size} has not answered in {TIMEOUT_S} s"
                ok, result = pickle.loads(pipe.recv_bytes())
                assert ok, f"rank {rank}:\n{result}"
                results.append(result)
            return results
        except BaseException:
            self._kill()
            self._start()
            raise

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(10)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from dtrain import plan

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    # Every group costs each rank three threads: meshes that are equal are one.
    plan.init_device_mesh = lru_cache(None)(plan.init_device_mesh)
    while (work := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments = work
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch would share a file for each tensor
    dist.destroy_process_group()
