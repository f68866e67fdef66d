"""A run under a parameter server, as its ranks see it.

rank 0 .. S-1   keep the weights (`Server`); a step of their loop is one global batch of gradients
other ranks     look after a worker process each (`supervise`), and start another one where it dies
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store, TCPStore
from torch.optim import Optimizer

from dtrain.config.schema import Config
from dtrain.launch.consistency import digest, refuse_other_weights, tensors_of
from dtrain.launch.rendezvous import address_of_first
from dtrain.launch.world import World
from dtrain.model.layout import is_foreign
from dtrain.parallel.plan import Plan
from dtrain.strategy.parameter_server.protocol import OVER
from dtrain.strategy.parameter_server.report import report
from dtrain.strategy.parameter_server.server import Server
from dtrain.strategy.parameter_server.session import WorkerSession
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.supervisor import supervise
from dtrain.strategy.parameter_server.worker import MakeParts
from dtrain.task.base import Task
from dtrain.train import Settings, Step, Trainer


class ParameterServerTrainer:
    """What a run needs of a trainer. Making one is a collective; training is not.

    Args:
        task, optimizer, settings: as of every trainer.
        plan: has a parameter server.
        config, world: of this rank.
        parts: makes the task and the plan of a worker.
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
        self.strategy, self.rank, self.settings = strategy, world.rank, settings
        self.saving = list(range(strategy.servers))  # ranks that write checkpoints
        self._store, self.address = _shared_store()
        self._servers = dist.new_group(self.saving)
        self._worker_arguments = parts, config, world, self.address
        self._timeout_s = config.launch.timeout_s
        self._local = local_trainer(task, plan, strategy, optimizer, settings)
        self._server = Server(self._local, strategy, self.rank, self._servers, self._timeout_s)
        self._sessions: list[WorkerSession] = []
        self.models = self._local.models
        self.begin, self.load = self._local.begin, self._local.load
        # each rank has made the models, as its worker will
        for model in filter(is_foreign, self.models.values()):
            refuse_other_weights(
                {name: digest(tensor) for name, tensor in tensors_of(model)}, type(model).__name__
            )
        self.next_step = self.tokens = 0
        self._first_step = self._first_version = 0  # of this run
        self._seconds = 0.0

    def steps(self) -> Iterator[Step]:
        """Yield the steps of all workers together on a server; elsewhere wait for the end."""
        if self.rank >= self.strategy.servers:
            worker = self.rank - self.strategy.servers
            supervise(worker, self.strategy.restarts, self._store, *self._worker_arguments)
            return
        server = self._server
        server.begin(self.next_step)
        self._first_step, self._first_version = self.next_step, server.version
        self._sessions = [
            WorkerSession(server, worker, self.address, self._timeout_s)
            for worker in range(self.strategy.workers)
        ]
        threads = [threading.Thread(target=s.run, daemon=True) for s in self._sessions]
        for thread in threads:
            thread.start()
        try:
            yield from self._steps(threads)
        except GeneratorExit:  # the run stops before its last step
            server.stop()
        if self.rank == 0:
            self._store.set(OVER, "")
        for thread in threads:
            thread.join()

    def _steps(self, threads: list[threading.Thread]) -> Iterator[Step]:
        server, start = self._server, time.perf_counter()
        while self.next_step < self.settings.steps:
            tokens = self._local.task.size(self._local.task.batch(self.next_step))
            with server.lock:  # held while the run evaluates or saves: nothing changes meanwhile
                server.wait_for_step(threads)
                if self.strategy.servers > 1:
                    # another server may lack a gradient, which somebody computes on our weights
                    with server.released():
                        dist.barrier(group=self._servers)
                # workers compute while the run evaluates
                seconds, start = time.perf_counter() - start, time.perf_counter()
                yield self._step(tokens, seconds)
                server.lock.notify_all()

    def _step(self, tokens: int, seconds: float) -> Step:
        """Return the figures of the step that has ended, and begin the next one."""
        losses, norms = self._server.log.take()
        self._seconds += seconds
        self.tokens, self.next_step = self.tokens + tokens, self.next_step + 1
        self._server.next_step = self.next_step
        return Step(
            self.next_step,
            sum(losses.values()),
            math.hypot(*norms.values()),
            next(iter(self._local.optimizers.values())).param_groups[0]["lr"],
            self.tokens,
            tokens / seconds,
            seconds,
            losses,
        )

    def figures(self) -> dict[str, float]:
        """Return the updates and gradients so far, and the gradients' mean staleness."""
        staleness = self._server.staleness
        gradients = sum(staleness.values())
        mean = sum(stale * times for stale, times in staleness.items()) / max(1, gradients)
        return {"updates": self._server.version, "gradients": gradients, "staleness": mean}

    def totals(self) -> dict[str, Tensor]:
        """See `Trainer`. Collective: all servers call it, with their locks held."""
        self._gather()
        return self._local.totals()

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`. Collective: all servers call it, with their locks held."""
        self._gather()
        return self._local.state()

    def report(self) -> dict[str, Any]:
        """Return what a profile holds of other strategies, where it exists here. A collective."""
        updates = self._server.version - self._first_version
        steps = self.next_step - self._first_step
        return report(self._server, self._sessions, steps, updates, self._seconds)

    def _gather(self) -> None:
        """Copy the weights of each server to all servers."""
        if self.strategy.servers > 1 and self.rank < self.strategy.servers:
            for owner, share in enumerate(self._server.shares):
                for parameter in share.parameters:
                    dist.broadcast(parameter.data, group=self._servers, group_src=owner)


def local_trainer(
    task: Task,
    plan: Plan,
    strategy: ParameterServer,
    optimizer: Callable[[nn.Module], Optimizer],
    settings: Settings,
) -> Trainer:
    """Return a trainer of one process, which evaluates as many rows at once as a worker trains."""
    rows = settings.micro_batch_size or max(1, settings.global_batch_size // strategy.workers)
    alone = Plan((), 1, plan.precision, plan.device, clip_norm=plan.clip_norm)
    return Trainer(task, alone, optimizer, replace(settings, micro_batch_size=rows))


def _shared_store() -> tuple[Store, tuple[str, int]]:
    """Return a store that every process of the run reaches, later ones too, and its address.

    A collective.
    """
    store, host = None, address_of_first()
    address = host, 0
    if dist.get_rank() == 0:
        family = socket.getaddrinfo(host, None)[0][0]
        # torch's own would listen on all interfaces
        listener = socket.create_server((host, 0), family=family)
        address = host, int(listener.getsockname()[1])
        store = TCPStore(
            host,
            address[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    shared = [address]
    dist.broadcast_object_list(shared, src=0)
    return store or TCPStore(*shared[0], is_master=False), shared[0]
