"""Worlds of real gloo ranks that stay up and serve many cases."""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from warm import Process, nursery

from dtrain.parallel import plan

TIMEOUT_S = 300
KEPT_CASES = 6  # as many cases use the groups of each other
ENGINES = {"deepspeed", "accelerate"}  # which keep groups themselves


class World:
    """`size` processes in one process group; each runs what it is given and sends back what came of
    it.

    Between two cases they are stopped: each group has a thread that wakes a hundred times a second
    for nothing.
    """

    def __init__(self, size: int, *preload: str) -> None:
        self.size, self.preload = size, preload
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Process] = []
        store = str(Path(self._folder.name) / "store")
        with open(os.devnull) as nothing:
            for rank in range(self.size):
                ours, theirs = multiprocessing.Pipe()
                words = ["-c", "worlds:serve", str(rank), str(self.size), store]
                streams = (nothing, sys.__stdout__, sys.__stderr__, theirs)
                self._processes.append(
                    nursery(*self.preload).start(words, os.getcwd(), dict(os.environ), streams)
                )
                theirs.close()
                self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; their results in order. Raises what a rank
        raised.

        After a failure the ranks may wait for each other: new ones take their places.
        """
        try:
            self._signal(signal.SIGCONT)
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((function, arguments)))
            results = [None] * self.size
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
            while waiting:
                answered: list[Any] = multiprocessing.connection.wait(waiting, TIMEOUT_S)
                assert answered, (
                    f"ranks {[*waiting.values()]} of {self.size} have not answered in {TIMEOUT_S} s"
                )
                for pipe in answered:
                    rank, (ok, result) = waiting.pop(pipe), _answer(pipe)
                    assert ok, f"rank {rank}:\n{result}"
                    results[rank] = result
            self._signal(signal.SIGSTOP)
            return results
        except BaseException:
            self._kill()
            self._start()
            raise

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                break
        self._kill()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


@contextmanager
def worlds(*preload: str) -> Iterator[Callable[[int], World]]:
    """Worlds by their sizes, each started once; `preload`: modules that their ranks have
    imported.
    """
    started: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in started:
            started[size] = World(size, *preload)
        return started[size]

    try:
        yield of
    finally:
        for each in started.values():
            each.close()


def serve(rank: str, size: str, store: str, file: int) -> None:
    """What a rank does."""
    pipe = Connection(file)
    torch.set_num_threads(1)
    shared, timeout = dist.FileStore(store, int(size)), timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", store=shared, rank=int(rank), world_size=int(size), timeout=timeout
    )
    # A hundred groups' threads take a core: meshes that are equal are one, and groups do not stay
    # for ever.
    plan.init_device_mesh = lru_cache(None)(plan.init_device_mesh)
    done = 0
    while (work := _next(pipe)) is not None:
        function, arguments = work
        done += 1
        if done % KEPT_CASES == 0 and not ENGINES & set(sys.modules):
            _leave_groups()
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch would share a file for each tensor
    dist.destroy_process_group()


def _leave_groups() -> None:
    """Let go of all groups, with which every rank has done by now, and of what remembers their
    names.
    """
    from torch.distributed.tensor import _redistribute, debug

    plan.init_device_mesh.cache_clear()  # type: ignore[attr-defined]
    for group in [*c10d._world.pg_map]:
        if group is not dist.GroupMember.WORLD:
            dist.destroy_process_group(group)
    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


def _next(pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:  # whoever asks is gone
        return None


def _answer(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "its process is gone"
