"""A worker of a parameter server: a process that pulls weights, computes one gradient, and
pushes it.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.config.schema import Config
from dtrain.data.seeded import seed_everything
from dtrain.launch.fault_injection import slowed
from dtrain.launch.rank_processes import STOPS
from dtrain.launch.world import World, cores
from dtrain.parallel.clip import clip_gradients
from dtrain.parallel.plan import Plan
from dtrain.strategy.parameter_server.connection import Connection
from dtrain.strategy.parameter_server.gradient_compression import GradientCompression
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.work_queue import SYNC
from dtrain.strategy.zero1 import equal_shares
from dtrain.task.base import Task
from dtrain.task.batch import Batch, Models, divide

MakeParts = Callable[[], tuple[Task, Plan]]  # that travels to another process
OVER = "over"  # the key that the first server sets when there is no more work
PULL, PUSH, BYE = 0, 1, 2  # what a worker says
WORK, WAIT, STOP = 0, 1, 2  # and a server


def run_worker(
    parts: MakeParts, config: Config, world: World, address: tuple[str, int], life: int
) -> None:
    """What the process does, in one of its lives, until the servers have no more work.

    Args:
        parts: makes its task and plan.
        config, world: of the rank that looks after it.
        address: of the servers' store.
        life: how many of this worker there have been before.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # its rank decides
    torch.set_num_threads(config.launch.threads or max(1, cores() // world.local_size))
    logging.getLogger("dtrain").setLevel(logging.ERROR)  # its rank has said it all
    worker = Worker(parts(), config, world)
    store = dist.TCPStore(*address, is_master=False)
    store.set(f"{worker.number}/{life}", "")
    while not store.check([f"{worker.number}/{life}/welcome"]):
        if store.check([OVER]):  # the others have done all the work
            return
        time.sleep(0.05)
    links = [
        Connection(store, f"{worker.number}/{life}/{server}", 1, config.launch.timeout_s)
        for server in range(worker.strategy.servers)
    ]
    worker.run(links)


class Worker:
    """The model of one worker, and its part of every batch."""

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
        self.own = [
            {u.trains: of_model(self.models[u.trains], share) for u in self.task.updates}
            for share in self.shares
        ]
        self.encoders = [
            {name: compression(strategy, each) for name, each in own.items()} for own in self.own
        ]
        self._batch: tuple[int, Batch] = (-1, {})
        self.computed = self.waited = 0.0

    def run(self, links: list[Connection]) -> None:
        """Pull, compute, push, until told to stop."""
        while (pulled := self._pull(links)) is not None:
            item, versions = pulled
            begun = time.perf_counter()
            name, gradients, used, loss, norm = self._gradient(item)
            self.computed += time.perf_counter() - begun
            # the first one last: it counts what is finished
            for server in reversed(range(len(links))):
                own = [gradients[id(p)] for p in self.own[server][name]]
                has = [id(p) in used for p in self.own[server][name]]
                links[server].say(
                    PUSH, versions[server], item, loss, norm, self.computed, self.waited
                )
                links[server].tell(has)
                links[server].send(self.encoders[server][name].encode(own))
        for link in links:
            link.say(BYE)

    def _pull(self, links: list[Connection]) -> tuple[int, list[int]] | None:
        """The weights of all servers, an item, and the servers' versions; None: there is no
        more work.
        """
        begun, item, versions = time.perf_counter(), 0, []
        for link, share in zip(links, self.shares, strict=True):
            link.say(PULL, 0, item)
            while (heard := link.hear())[0] != WORK:
                if heard[0] == STOP:
                    return None
                link.say(PULL, 0, item)
            versions.append(int(heard[1]))
            item = int(heard[2])
            weights = torch.empty(sum(p.numel() for p in share), dtype=share[0].dtype)
            for parameter, part in zip(
                share, link.receive(weights).split([p.numel() for p in share]), strict=True
            ):
                parameter.data.copy_(part.view_as(parameter))
        self.waited += time.perf_counter() - begun
        return item, versions

    def _gradient(self, item: int) -> tuple[str, dict[int, Tensor], set[int], float, float]:
        """The model whose gradient item i is, the gradient by parameter, those used, the loss,
        the gradient's norm.
        """
        workers, updates = self.strategy.workers, self.task.updates
        rounds, part = divmod(item, workers)
        step, index = divmod(rounds, len(updates))
        if self._batch[0] != step:
            self._batch = step, self.task.batch(step)
        batch, update = self._batch[1], updates[index]
        scale = workers / update.count(batch).clamp(min=1).double()
        seed_everything(hash((self.config.seed, step, part, 0)) % 2**63)
        model = self.models[update.trains]
        rows = {
            name: tensor.to(self.plan.device)
            for name, tensor in list(divide(batch, workers))[part].items()
        }
        with slowed(self.config.inject.straggler, self.number + self.strategy.servers):
            loss = self.executor.train(update, rows, scale)
        # the server clips the whole
        norm = clip_gradients(model, self.plan) if self.strategy.mode != SYNC else torch.zeros(())
        used = {id(p) for p in model.parameters() if p.grad is not None}
        found = {
            id(p): torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()
        }
        for each in self.models.values():
            each.zero_grad()
        return update.trains, found, used, loss.item(), norm.item()


def shares_of(task: Task, models: Models, servers: int) -> list[list[nn.Parameter]]:
    """Which server keeps which weights of the models that are trained."""
    trained = {update.trains: None for update in task.updates}
    return equal_shares([p for name in trained for p in models[name].parameters()], servers)


def of_model(model: nn.Module, share: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those of a share that are the model's."""
    own = {id(p) for p in model.parameters()}
    return [p for p in share if id(p) in own]


def compression(strategy: ParameterServer, parameters: list[nn.Parameter]) -> GradientCompression:
    """How the gradients of these parameters travel."""
    shapes = [p.shape for p in parameters]
    dtype = parameters[0].dtype if parameters else torch.float32
    return GradientCompression(
        strategy.compression,
        shapes,
        dtype,
        share=strategy.top_k_fraction,
        rank=strategy.power_sgd_rank,
    )
