"""A run under a parameter server, as its ranks see it.

rank 0 .. S-1   keep the weights (`Server`); a step of their loop is one global batch of gradients
other ranks     look after a worker process each (`run_worker`), and start another one where it dies
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.config.schema import Config
from dtrain.launch.collectives import all_gather_object
from dtrain.launch.consistency import digest, refuse_other_weights, tensors_of
from dtrain.launch.rank_processes import PRELOADED, run_and_exit_with_parent
from dtrain.launch.rendezvous import address_of_first
from dtrain.launch.world import World
from dtrain.model.layout import is_foreign
from dtrain.parallel.plan import Plan
from dtrain.strategy.parameter_server.server import Server
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.work_queue import SYNC, SeenItems, WorkQueue
from dtrain.strategy.parameter_server.worker import OVER, MakeParts, run_worker
from dtrain.task.base import Task
from dtrain.train import Settings, Step


class ParameterServerTrainer(Server):
    """The trainer of one rank.

    Making one is a collective; training is not. Arguments: see `Server`, `run_worker`.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        optimizer: Callable[[nn.Module], Optimizer],
        settings: Settings,
        config: Config,
        world: World,
        parts: MakeParts,
    ) -> None:
        strategy = plan.strategy_on("dp")
        assert isinstance(strategy, ParameterServer)
        self._parts = parts  # for each life of a worker
        self.saving = list(range(strategy.servers))  # ranks that write checkpoints
        self._store, address = _shared_store()
        super().__init__(
            task, plan, optimizer, settings, config, world, address, dist.new_group(self.saving)
        )
        # which each rank has made, as its worker will
        for model in filter(is_foreign, self.models.values()):
            refuse_other_weights(
                {name: digest(tensor) for name, tensor in tensors_of(model)}, type(model).__name__
            )
        self._begun = self._begun_version = 0  # steps and updates of earlier runs
        self._seconds = 0.0  # of this one's

    def steps(self) -> Iterator[Step]:
        """On a server the steps of all workers together; on other ranks none, until the
        training has ended.
        """
        if self.rank >= self.strategy.servers:
            self._look_after_a_worker()
            return
        self._begun = self.next_step
        total, self.applied = self.settings.steps * self.of_a_step, self.next_step * self.of_a_step
        self.queue = WorkQueue(
            total, self.strategy.workers, self.strategy.mode, self.strategy.bound, self.applied
        )
        self.once = SeenItems(self.applied)
        self.version = self._begun_version = self.applied // (
            self.strategy.workers if self.strategy.mode == SYNC else 1
        )
        mine = {id(p) for p in self.shares[self.rank]}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) in mine]
            for parameter in [p for p in optimizer.state if id(p) not in mine]:
                del optimizer.state[parameter]  # that a checkpoint has filled: another server's
        threads = [
            threading.Thread(target=self.attend, args=(w,), daemon=True)
            for w in range(self.strategy.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            yield from self._steps(threads)
        except GeneratorExit:  # the run is told to stop: there is no more work
            with self.lock:
                self.queue.total = 0
                self.lock.notify_all()
        if self.rank == 0:
            self._store.set(OVER, "")
        for thread in threads:
            thread.join()

    def _steps(self, threads: list[threading.Thread]) -> Iterator[Step]:
        begun = time.perf_counter()
        while self.next_step < self.settings.steps:
            tokens = self.task.size(self.task.batch(self.next_step))
            with self.lock:  # held while the loop evaluates or saves: nothing changes meanwhile
                while self.applied < (self.next_step + 1) * self.of_a_step:
                    if self.failure or not any(thread.is_alive() for thread in threads):
                        raise self.failure or RuntimeError(
                            "every worker of the parameter server is gone"
                        )
                    self.lock.wait(1.0)
                if self.strategy.servers > 1:
                    # another server may lack a gradient, which somebody computes on our weights
                    with self.released():
                        dist.barrier(group=self.servers)
                # workers compute while it evaluates
                seconds, begun = time.perf_counter() - begun, time.perf_counter()
                yield self._told(tokens, seconds)
                self.lock.notify_all()

    def _told(self, tokens: int, seconds: float) -> Step:
        """The figures of the gradients since the last step."""
        told, self.told = self.told, []
        self._seconds += seconds
        losses: dict[str, float] = {}
        norms: dict[str, float] = {}
        for index, update in enumerate(self.task.updates):
            own = [(loss, norm) for each, loss, norm in told if each == index]
            if own:
                losses[update.trains] = sum(loss for loss, _ in own) / len(own)
                norms[update.trains] = (sum(norm**2 for _, norm in own) / len(own)) ** 0.5
        self.tokens, self.next_step = self.tokens + tokens, self.next_step + 1
        lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        return Step(
            self.next_step,
            sum(losses.values()),
            math.hypot(*norms.values()),
            lr,
            self.tokens,
            tokens / seconds,
            seconds,
            losses,
        )

    def figures(self) -> dict[str, float]:
        """For the line of a step: updates of the weights so far, gradients, and their mean
        staleness.
        """
        gradients = sum(self.staleness.values())
        mean = sum(staleness * times for staleness, times in self.staleness.items()) / max(
            1, gradients
        )
        return {"updates": self.version, "gradients": gradients, "staleness": mean}

    def _look_after_a_worker(self) -> None:
        worker, log = self.rank - self.strategy.servers, logging.getLogger("dtrain")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for life in range(self.strategy.restarts + 1):
            arguments = (
                os.getpid(),
                run_worker,
                self._parts,
                self.config,
                self.world,
                self.address,
                life,
            )
            process = context.Process(target=run_and_exit_with_parent, args=arguments)
            process.start()
            log.info("worker %d, process %d", worker, process.pid)
            while process.exitcode is None:
                process.join(1.0)
                if process.exitcode is None and self._store.check([f"{worker}/{life}/lost"]):
                    process.kill()  # it was silent for too long: stopped, perhaps
            if process.exitcode == 0:
                break
            log.warning("worker %d ended with %s", worker, process.exitcode)
            self._store.set(f"{worker}/{life}/ended", "")
        else:
            self._store.set(f"{worker}/gone", "")
        while not self._store.check([OVER]):  # whatever comes next is for all ranks together
            time.sleep(0.2)

    # What all servers do together, while they hold their locks

    def _gather(self) -> None:
        """Everybody's weights on every server."""
        if self.strategy.servers > 1 and self.rank < self.strategy.servers:
            for owner, share in enumerate(self.shares):
                for parameter in share:
                    dist.broadcast(parameter.data, group=self.servers, group_src=owner)

    def totals(self) -> dict[str, Tensor]:
        self._gather()
        return super().totals()

    def state(self) -> dict[str, Tensor]:
        self._gather()
        return super().state()

    def report(self) -> dict[str, Any]:
        """What a profile tells of other strategies, as far as there is such a thing here.

        A collective of all ranks.
        """
        names = ("gradients", "compute_seconds", "wait_seconds")
        updates = self.version - self._begun_version
        told = {
            "mode": self.strategy.mode,
            "servers": self.strategy.servers,
            "updates": updates,
            "updates_per_second": updates / (self._seconds or 1.0),
            "most_ahead": self.queue.max_lead,
            "staleness": dict(sorted(self.staleness.items())),
            "lives": dict(self.lives),
            "workers": {
                w: dict(zip(names, each, strict=True)) for w, each in sorted(self.spent.items())
            },
        }
        every = all_gather_object((told, dict(self.traffic), self.next_step - self._begun))
        servers, steps = every[: self.strategy.servers], max(1, every[0][2])
        sent = [[_added(traffic.values(), "sent")] for _, traffic, _ in servers]
        for worker in range(self.strategy.workers):
            sent.append(
                [_added([traffic.get(worker, {}) for _, traffic, _ in servers], "received")]
            )
        ranks = [[_message(size, calls, steps) for size, calls in each] for each in sent]
        return {
            "ranks": [
                {"traffic": each, "traffic_predicted": None, "memory": None, "time": None}
                for each in ranks
            ],
            "bubble": None,
            "asynchronous": servers[0][0],
        }


def _added(links: Iterable[Mapping[str, int]], way: str) -> tuple[int, int]:
    """Bytes and messages of several links, as one end sees them."""
    counts = list(links)
    return tuple(sum(each.get(f"{way}{what}", 0) for each in counts) for what in ("", "_messages"))  # type: ignore[return-value]


def _message(size: int, calls: int, steps: int) -> dict[str, Any]:
    """Of a step, as a profile tells it."""
    return {
        "axis": "dp",
        "operation": "send",
        "calls": calls / steps,
        "bytes": size // steps,
        "wire_bytes": size / steps,
    }


def _shared_store() -> tuple[dist.Store, tuple[str, int]]:
    """A store that every process of the run reaches, workers that come back too, and its address.

    A collective.
    """
    store, host = None, address_of_first()
    address = host, 0
    if dist.get_rank() == 0:
        family = socket.getaddrinfo(host, None)[0][0]
        # torch's own would listen on all interfaces
        listener = socket.create_server((host, 0), family=family)
        address = host, int(listener.getsockname()[1])
        store = dist.TCPStore(
            host,
            address[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    told = [address]
    dist.broadcast_object_list(told, src=0)
    return store or dist.TCPStore(*told[0], is_master=False), told[0]
