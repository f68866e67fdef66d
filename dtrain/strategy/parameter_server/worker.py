"""A worker of a parameter server: a process that pulls weights, computes a gradient, pushes it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import TCPStore

from dtrain.config.schema import Config
from dtrain.launch.fault_injection import slowed
from dtrain.launch.rank_processes import STOPS
from dtrain.launch.world import World, cores
from dtrain.parallel.clip import clip_gradients
from dtrain.parallel.plan import Plan
from dtrain.strategy.parameter_server.connection import Connection
from dtrain.strategy.parameter_server.protocol import OVER, Header, Kind, Life
from dtrain.strategy.parameter_server.share import shares_of
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.work_queue import SYNC
from dtrain.task.base import Task
from dtrain.task.batch import Batch, divide
from dtrain.train import loss_scale, seed_step

MakeParts = Callable[[], tuple[Task, Plan]]  # can be pickled, for another process


def run_worker(
    parts: MakeParts, config: Config, world: World, address: tuple[str, int], life: int
) -> None:
    """Compute gradients in a process of its own, until the servers have no more work.

    Args:
        parts: makes the worker's task and plan.
        config, world: of the rank that looks after it.
        address: of the servers' store.
        life: how many processes this worker had before.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # its rank decides
    torch.set_num_threads(config.launch.threads or max(1, cores() // world.local_size))
    logging.getLogger("dtrain").setLevel(logging.ERROR)  # its rank has logged the rest
    worker = Worker(parts(), config, world)
    store, own = TCPStore(*address, is_master=False), Life(worker.number, life)
    store.set(own.begun, "")
    while not store.check([own.welcome]):
        if store.check([OVER]):  # the others have done all the work
            return
        time.sleep(0.05)
    names = [own.connection(server) for server in range(worker.strategy.servers)]
    worker.run([Connection(store, name, 1, config.launch.timeout_s) for name in names])


@dataclass(frozen=True)
class Gradient:
    """What a worker computes of an item.

    Args:
        model: that it is the gradient of.
        by_parameter: by the ids of the parameters that the rows have used.
        loss: the mean over the part's items.
        norm: before clipping; 0 where the server clips.
    """

    model: str
    by_parameter: dict[int, Tensor]
    loss: float
    norm: float


class Worker:
    """The models of one worker, and its part of every batch."""

    def __init__(self, parts: tuple[Task, Plan], config: Config, world: World) -> None:
        self.task, plan = parts
        strategy = plan.strategy_on("dp")
        assert isinstance(strategy, ParameterServer)
        self.config, self.strategy = config, strategy
        self.number = world.rank - strategy.servers
        self.plan = Plan(
            (), 1, plan.precision, plan.device, plan.recompute, clip_norm=plan.clip_norm
        )
        micro_batches = plan.micro_batches(config.global_batch_size, config.micro_batch_size)
        self.models = {
            name: self.plan.parallelize(make, config.seed)
            for name, make in self.task.models.items()
        }
        self.executor = self.plan.executor(self.models, {}, micro_batches)
        self.shares = shares_of(self.task, self.models, strategy.servers)
        self.compressions = [share.compressions(strategy) for share in self.shares]
        self.compute_seconds = self.wait_seconds = 0.0
        self._batch: tuple[int, Batch] = (-1, {})  # with its step

    def run(self, connections: Sequence[Connection]) -> None:
        """Pull, compute and push, until told to stop."""
        while (pulled := self._pull(connections)) is not None:
            item, versions = pulled
            start = time.perf_counter()
            gradient = self.gradient(item)
            self.compute_seconds += time.perf_counter() - start
            # the first server last: it counts what is finished
            for server in reversed(range(len(connections))):
                self._push(connections[server], server, item, versions[server], gradient)
        for connection in connections:
            connection.send_header(Header(Kind.BYE))

    def _pull(self, connections: Sequence[Connection]) -> tuple[int, list[int]] | None:
        """Take an item, and the weights of all servers.

        Return the item and the weights' versions by server; None: there is no more work.
        """
        start, item, versions = time.perf_counter(), 0, []
        for connection, share in zip(connections, self.shares, strict=True):
            header = Header(Kind.WAIT)
            while header.kind == Kind.WAIT:
                connection.send_header(Header(Kind.PULL, item))
                header = connection.receive_header()
            if header.kind == Kind.STOP:
                return None
            versions.append(header.version)
            item = header.item
            share.load(connection.receive_tensor(share.empty()))
        self.wait_seconds += time.perf_counter() - start
        return item, versions

    def _push(
        self, connection: Connection, server: int, item: int, version: int, gradient: Gradient
    ) -> None:
        """Send a server its share of the gradient."""
        parameters = self.shares[server].by_model[gradient.model]
        figures = gradient.loss, gradient.norm, self.compute_seconds, self.wait_seconds
        connection.send_header(Header(Kind.PUSH, item, version, *figures))
        tensors = [gradient.by_parameter.get(id(p)) for p in parameters]
        connection.send_flags([tensor is not None for tensor in tensors])
        whole = [
            torch.zeros_like(p) if tensor is None else tensor
            for p, tensor in zip(parameters, tensors, strict=True)
        ]
        connection.send_tensor(self.compressions[server][gradient.model].encode(whole))

    def gradient(self, item: int) -> Gradient:
        """Compute the gradient of an item's part of its batch."""
        workers, updates = self.strategy.workers, self.task.updates
        rounds, part = divmod(item, workers)
        step, index = divmod(rounds, len(updates))
        if self._batch[0] != step:
            self._batch = step, self.task.batch(step)
        batch, update = self._batch[1], updates[index]
        scale = loss_scale(update, batch, workers)
        seed_step(self.config.seed, step, part, stage=0)
        model = self.models[update.trains]
        rows = self.plan.shard(list(divide(batch, workers))[part])
        with slowed(self.config.inject.straggler, self.number + self.strategy.servers):
            loss = self.executor.train(update, rows, scale)
        # in `sync` the server clips the mean
        norm = clip_gradients(model, self.plan) if self.strategy.mode != SYNC else torch.zeros(())
        by_parameter = {id(p): p.grad for p in model.parameters() if p.grad is not None}
        for any_model in self.models.values():
            any_model.zero_grad()
        return Gradient(update.trains, by_parameter, loss.item(), norm.item())
