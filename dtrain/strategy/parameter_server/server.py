"""What a rank that keeps weights does for each worker: threads that hand out weights and apply
gradients.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.config.schema import Config
from dtrain.launch.world import World
from dtrain.parallel.clip import clip_factor
from dtrain.parallel.plan import Plan
from dtrain.strategy.parameter_server.connection import Connection, PeerLost
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.work_queue import SYNC, SeenItems, WorkQueue
from dtrain.strategy.parameter_server.worker import (
    BYE,
    OVER,
    PULL,
    PUSH,
    STOP,
    WAIT,
    WORK,
    compression,
    of_model,
    shares_of,
)
from dtrain.task.base import Task
from dtrain.train import NonFinite, Settings, Trainer

# how often a server looks for a worker; how long a worker that must wait is left alone
POLL_S, PATIENCE_S = 0.05, 0.5
TURN_S = 0.002  # how often it looks whether it is the turn of one that waits


class Server(Trainer):
    """The weights of one server, and its side of every link. Whatever changes is changed with the
    lock held.

    Args:
        task, plan, optimizer, settings: as of every trainer; the plan has a parameter server.
        config, world: of this rank.
        address: of the store that workers reach; servers: the group of all servers.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        optimizer: Callable[[nn.Module], Optimizer],
        settings: Settings,
        config: Config,
        world: World,
        address: tuple[str, int],
        servers: dist.ProcessGroup | None,
    ) -> None:
        strategy = plan.strategy_on("dp")
        assert isinstance(strategy, ParameterServer)
        # It evaluates what its workers train at once, and no more rows: for them there is memory.
        rows = settings.micro_batch_size or max(1, settings.global_batch_size // strategy.workers)
        alone = Plan((), 1, plan.precision, plan.device, clip_norm=plan.clip_norm)
        super().__init__(task, alone, optimizer, replace(settings, micro_batch_size=rows))
        self.strategy, self.rank, self.config, self.world = strategy, world.rank, config, world
        self.servers, self.address = servers, address
        self.shares = shares_of(task, self.models, strategy.servers)
        share = self.shares[min(self.rank, strategy.servers - 1)]  # other ranks keep none
        self._own = {
            update.trains: of_model(self.models[update.trains], share) for update in task.updates
        }
        self.rounds = len(task.updates)  # of a step
        self.lock = threading.Condition()
        self.queue, self.once = WorkQueue(0, 1), SeenItems()
        self.applied = 0  # gradients, of this run and those before it
        self.version, self.staleness, self.lives = 0, Counter[int](), Counter[int]()
        self._gathering: dict[int, dict[int, tuple[list[Tensor], list[bool]]]] = defaultdict(dict)
        # update, loss and norm of the gradients since the last step
        self.told: list[tuple[int, float, float]] = []
        # of each worker: gradients, seconds computing, seconds waiting
        self.spent: dict[int, list[float]] = {}
        self.traffic: dict[int, Counter[str]] = defaultdict(Counter)  # of each worker's links
        self.failure: BaseException | None = None
        # who has not begun yet: for them the others wait, once
        self._absent = set(range(strategy.workers))
        self._begin_by = time.monotonic() + config.launch.timeout_s

    @property
    def of_a_step(self) -> int:
        """Gradients."""
        return self.rounds * self.strategy.workers

    # What the threads of a server do

    def attend(self, worker: int) -> None:
        """Serve one worker, in every one of its lives."""
        # its own: a wait on one holds up all who share it
        store = dist.TCPStore(*self.address, is_master=False)
        try:
            for life in range(self.strategy.restarts + 1):
                if not self._awaited(store, worker, life):
                    self._absent.discard(worker)
                    if store.check([f"{worker}/{life}/ended"]):
                        continue
                    return
                try:
                    link = Connection(
                        store, f"{worker}/{life}/{self.rank}", 0, self.config.launch.timeout_s
                    )
                    return self._serve(worker, link)
                except PeerLost as error:
                    logging.getLogger("dtrain").warning("worker %d is gone: %s", worker, error)
                    store.set(f"{worker}/{life}/lost", "")
                    with self.lock:
                        self.queue.remove_worker(worker)
                        self.lock.notify_all()
        except BaseException as error:  # noqa: BLE001  told to the loop
            with self.lock:
                self.failure = error
                self.lock.notify_all()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have the lock meanwhile; to be called with it held."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    def _awaited(self, store: dist.Store, worker: int, life: int) -> bool:
        """Wait for a worker's life to begin; False: it has ended before, or there is no more
        work.
        """
        key = f"{worker}/{life}" if self.rank == 0 else f"{worker}/{life}/welcome"
        while not store.check([key]):
            if self.failure or any(
                store.check([k]) for k in (OVER, f"{worker}/gone", f"{worker}/{life}/ended")
            ):
                return False
            time.sleep(POLL_S)
        if self.rank == 0:
            store.set(f"{worker}/{life}/welcome", "")
        return True

    def _serve(self, worker: int, link: Connection) -> None:
        share = self.shares[self.rank]
        decoders = {name: compression(self.strategy, own) for name, own in self._own.items()}
        # in its earlier lives
        before, spent, pushed = self.traffic[worker], self.spent.get(worker, [0.0] * 3), 0
        with ThreadPoolExecutor(1) as aside:  # applies a gradient, while the worker is told to wait
            applied = aside.submit(self._join, worker)
            try:
                while (heard := link.hear())[0] != BYE:
                    kind, version, item, loss, norm, computed, waited, *_ = heard
                    if kind == PULL:
                        self._answer(worker, link, int(item), share, applied)
                    if kind == PUSH:
                        pushed += 1
                        index = int(item) // self.strategy.workers % self.rounds
                        name = self.task.updates[index].trains
                        decoder, used = decoders[name], link.told(len(self._own[name]))
                        gradients = decoder.decode(
                            link.receive(torch.empty(decoder.size, dtype=torch.uint8))
                        )
                        self.spent[worker] = [
                            spent[0] + pushed,
                            spent[1] + computed,
                            spent[2] + waited,
                        ]
                        push = partial(self._push, worker, int(item), int(version))
                        applied = aside.submit(push, gradients, used, loss, norm)
                    self.traffic[worker] = before + Counter(link.counts)
            finally:
                applied.result()  # what went wrong there says more than that the worker is gone

    def _join(self, worker: int) -> None:
        with self.lock:
            self.lives[worker] += 1
            self._absent.discard(worker)
            self.queue.add_worker(worker)

    def _answer(
        self,
        worker: int,
        link: Connection,
        wanted: int,
        share: list[nn.Parameter],
        applied: Future[None],
    ) -> None:
        """The weights, and on the first server an item; or word to wait, or to stop.

        Whoever evaluates or saves keeps the lock, so nobody waits for it without a limit here: a
        worker that heard nothing for long would think that we are gone.
        """
        deadline = time.monotonic() + PATIENCE_S
        if not wait([applied], PATIENCE_S).done:
            return link.say(WAIT)
        applied.result()
        while self.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            try:
                item, done, version = self._item(worker, wanted), self.queue.done, self.version
                weights = (
                    torch.cat([p.detach().flatten() for p in share]) if item is not None else None
                )
            finally:
                self.lock.release()
            if weights is not None:
                link.say(WORK, version, item or 0)
                link.send(weights)
                return None
            if done and self.rank == 0:
                return link.say(STOP)
            time.sleep(TURN_S)
        return link.say(WAIT)

    def _item(self, worker: int, wanted: int) -> int | None:
        if self.rank == 0:
            waits = self._absent and time.monotonic() < self._begin_by
            return None if waits else self.queue.next_item(worker)
        ready = (
            self.strategy.mode != SYNC
            or self.applied // self.strategy.workers >= wanted // self.strategy.workers
        )
        return wanted if ready else None

    def _push(
        self,
        worker: int,
        item: int,
        version: int,
        gradients: list[Tensor],
        used: list[bool],
        loss: float,
        norm: float,
    ) -> None:
        index = item // self.strategy.workers % self.rounds
        with self.lock:
            # A step's gradients are told together, so those of the next one wait until the loop has
            # seen it.
            self.lock.wait_for(
                lambda: self.applied < (self.next_step + 1) * self.of_a_step or self.failure
            )
            if not self.once.first(item):
                return
            if self.strategy.mode == SYNC:
                self._gathering[item // self.strategy.workers][item % self.strategy.workers] = (
                    gradients,
                    used,
                )
                self.told.append((index, loss, norm))
                parts = self._gathering[item // self.strategy.workers]
                if len(parts) == self.strategy.workers:
                    self._apply_all(index, self._gathering.pop(item // self.strategy.workers))
            else:
                stale = self.version - version
                self.staleness[stale] += 1
                self.told.append((index, loss, norm))
                self._apply(
                    index,
                    gradients,
                    used,
                    1.0 / max(1, stale) if self.strategy.divides_by_staleness else 1.0,
                )
                self.applied += 1
            if self.rank == 0:
                self.queue.complete(worker)
            self.lock.notify_all()

    def _apply_all(self, index: int, parts: dict[int, tuple[list[Tensor], list[bool]]]) -> None:
        """A round's gradients, averaged in the order of the parts, and clipped by the norm of
        the whole.
        """
        sums = [tensor.clone() for tensor in parts[0][0]]
        for part in range(1, len(parts)):
            for total, gradient in zip(sums, parts[part][0], strict=True):
                total += gradient
        for total in sums:
            total /= len(parts)
        square = sum(
            (total.double().square().sum() for total in sums),
            start=torch.zeros((), dtype=torch.float64),
        )
        if self.strategy.servers > 1:
            # another server may lack a part, which somebody has to compute on our weights
            with self.released():
                dist.all_reduce(square, group=self.servers)
        norm = square.sqrt()
        self.told = [
            (each, loss, norm.item() if each == index else old) for each, loss, old in self.told
        ]
        if self.plan.clip_norm is not None:
            for total in sums:
                total *= clip_factor(norm, self.plan.clip_norm).to(total.dtype)
        self.staleness[0] += len(parts)
        used = [any(each) for each in zip(*(used for _, used in parts.values()), strict=True)]
        self._apply(index, sums, used, 1.0)
        self.applied += len(parts)

    @torch.no_grad()
    def _apply(self, index: int, gradients: list[Tensor], used: list[bool], factor: float) -> None:
        """A step of what some row has used, and of what compression has left of earlier
        gradients.
        """
        update = self.task.updates[index]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise NonFinite(
                f"step {self.next_step + 1}: a gradient of {update.trains!r} is not finite: "
                f"training stops "
                f"before this update; try a lower optimizer.lr or more "
                f"lr_schedule.warmup_steps"
            )
        optimizer = self.optimizers[update.trains]
        self._set_rate(self.next_step)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        for parameter, gradient, has in zip(self._own[update.trains], gradients, used, strict=True):
            parameter.grad = gradient if has or gradient.any() else None
        optimizer.step()
        optimizer.zero_grad()
        self._set_rate(self.next_step)
        self.version += 1
        if update.then:
            update.then(self.models)
