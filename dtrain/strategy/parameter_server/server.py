"""The weights of one server: what it hands out, and how it applies gradients.

Its workers' sessions (`session.py`) are threads that share it; whatever changes is changed with
`lock` held.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.parallel.clip import clip_factor
from dtrain.strategy.parameter_server.gradient_log import GradientLog
from dtrain.strategy.parameter_server.protocol import Header, Kind
from dtrain.strategy.parameter_server.share import shares_of
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.parameter_server.work_queue import SYNC, SeenItems, WorkQueue
from dtrain.train import NonFinite, Trainer

Pushed = tuple[list[Tensor], list[bool]]  # gradients, and which of their weights rows have used


class Server:
    """The weights that the rank keeps, and the counts of what has been done to them.

    Args:
        trainer: holds the models and the optimizers; its loop does not run.
        rank: of this server.
        group: of all servers.
        start_timeout_s: for which the first items wait for workers that have not begun.
    """

    def __init__(
        self,
        trainer: Trainer,
        strategy: ParameterServer,
        rank: int,
        group: dist.ProcessGroup | None,
        start_timeout_s: float,
    ) -> None:
        self.trainer, self.strategy, self.rank, self.group = trainer, strategy, rank, group
        self.shares = shares_of(trainer.task, trainer.models, strategy.servers)
        self.share = self.shares[min(rank, strategy.servers - 1)]  # ranks of workers use none
        self.gradients_per_step = len(trainer.task.updates) * strategy.workers
        self.lock = threading.Condition()
        self.queue, self.seen = WorkQueue(0, 1), SeenItems()
        self.next_step = 0
        self.applied = self.version = 0  # gradients and updates, earlier runs' included
        self.staleness, self.lives = Counter[int](), Counter[int]()  # lives by worker
        self.log = GradientLog(trainer.task.updates)
        self.failure: BaseException | None = None
        self._rounds: dict[int, dict[int, Pushed]] = defaultdict(dict)  # incomplete ones, by part
        self._absent = set(range(strategy.workers))  # the others wait until these begin, once
        self._start_by = time.monotonic() + start_timeout_s

    def begin(self, step: int) -> None:
        """Go on from a step, with the weights and states that the trainer holds now."""
        self.next_step, self.applied = step, step * self.gradients_per_step
        total, strategy = self.trainer.settings.steps * self.gradients_per_step, self.strategy
        self.queue = WorkQueue(
            total, strategy.workers, strategy.mode, strategy.bound, begin=self.applied
        )
        self.seen = SeenItems(self.applied)
        self.version = self.applied // (strategy.workers if strategy.mode == SYNC else 1)
        own = {id(p) for p in self.share.parameters}
        for optimizer in self.trainer.optimizers.values():
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) in own]
            for parameter in [p for p in optimizer.state if id(p) not in own]:
                del optimizer.state[parameter]  # filled by a checkpoint, and another server's

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have the lock meanwhile. It must be held."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    def stop(self) -> None:
        """Give out no more items."""
        with self.lock:
            self.queue.total = 0
            self.lock.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the rank's loop raise what has gone wrong in a session."""
        with self.lock:
            self.failure = error
            self.lock.notify_all()

    def wait_for_step(self, running: list[threading.Thread]) -> None:
        """Wait, with the lock held, until all gradients of the next step are applied."""
        while self.applied < (self.next_step + 1) * self.gradients_per_step:
            if self.failure or not any(thread.is_alive() for thread in running):
                raise self.failure or RuntimeError("every worker of the parameter server is gone")
            self.lock.wait(1.0)

    def add_worker(self, worker: int) -> None:
        with self.lock:
            self.lives[worker] += 1
            self._absent.discard(worker)
            self.queue.add_worker(worker)

    def remove_worker(self, worker: int) -> None:
        with self.lock:
            self.queue.remove_worker(worker)
            self.lock.notify_all()

    def give_up(self, worker: int) -> None:
        """Let nobody wait until the worker begins."""
        self._absent.discard(worker)

    def answer(self, worker: int, wanted: int) -> tuple[Header, Tensor | None]:
        """Return WORK and the weights, or WAIT, or STOP; to be called with the lock held.

        The first server chooses the item; the others are asked for the weights of one.
        """
        item: int | None = wanted
        if self.rank == 0:
            waits = self._absent and time.monotonic() < self._start_by
            item = None if waits else self.queue.next_item(worker)
        elif self.strategy.mode == SYNC and self._round_of(self.applied) < self._round_of(wanted):
            item = None
        if item is not None:
            return Header(Kind.WORK, item, self.version), self.share.flat()
        return Header(Kind.STOP if self.rank == 0 and self.queue.done else Kind.WAIT), None

    def _round_of(self, item: int) -> int:
        return item // self.strategy.workers

    def model_of(self, item: int) -> str:
        """Return the name of the model whose gradient the item is."""
        return self.trainer.task.updates[self._update_of(item)].trains

    def _update_of(self, item: int) -> int:
        """Return which of a step's updates the item is a part of."""
        return self._round_of(item) % len(self.trainer.task.updates)

    def push(self, worker: int, header: Header, gradients: list[Tensor], used: list[bool]) -> None:
        """Apply a worker's gradient; in `sync` keep it until the round is complete."""
        update = self._update_of(header.item)
        with self.lock:
            # The loop reports a step's gradients together: those of the next one wait until then.
            self.lock.wait_for(
                lambda: (
                    self.applied < (self.next_step + 1) * self.gradients_per_step or self.failure
                )
            )
            if not self.seen.first(header.item):
                return
            self.log.add(update, header.loss, header.norm)
            if self.strategy.mode == SYNC:
                parts = self._rounds[number := self._round_of(header.item)]
                parts[header.item % self.strategy.workers] = gradients, used
                if len(parts) == self.strategy.workers:
                    self._apply_round(update, self._rounds.pop(number))
            else:
                stale = self.version - header.version
                self.staleness[stale] += 1
                divisor = max(1, stale) if self.strategy.divides_by_staleness else 1
                self._apply(update, gradients, used, 1.0 / divisor)
                self.applied += 1
            if self.rank == 0:
                self.queue.complete(worker)
            self.lock.notify_all()

    def _apply_round(self, update: int, parts: dict[int, Pushed]) -> None:
        """Apply the mean of a round's gradients, clipped by the norm over all servers."""
        sums = [gradient.clone() for gradient in parts[0][0]]
        for part in range(1, len(parts)):  # in one order, whoever came first
            for total, gradient in zip(sums, parts[part][0], strict=True):
                total += gradient
        for total in sums:
            total /= len(parts)
        square = torch.zeros((), dtype=torch.float64)
        for total in sums:
            square = square + total.double().square().sum()
        if self.strategy.servers > 1:
            # another server may lack a part, which somebody has to compute on our weights
            with self.released():
                dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        self.log.set_norms(update, norm.item())
        if (clip_norm := self.trainer.plan.clip_norm) is not None:
            for total in sums:
                total *= clip_factor(norm, clip_norm).to(total.dtype)
        self.staleness[0] += len(parts)
        used = [any(flags) for flags in zip(*(flags for _, flags in parts.values()), strict=True)]
        self._apply(update, sums, used, 1.0)
        self.applied += len(parts)

    @torch.no_grad()
    def _apply(self, index: int, gradients: list[Tensor], used: list[bool], factor: float) -> None:
        """Step the weights that some row has used, or that compression has left a gradient of."""
        update = self.trainer.task.updates[index]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise NonFinite(
                f"step {self.next_step + 1}: a gradient of {update.trains!r} is not finite: "
                f"training stops before this update; try a lower optimizer.lr or more "
                f"lr_schedule.warmup_steps"
            )
        optimizer = self.trainer.optimizers[update.trains]
        parameters = self.share.by_model[update.trains]
        self.trainer.set_learning_rate(self.next_step)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        for parameter, gradient, has in zip(parameters, gradients, used, strict=True):
            parameter.grad = gradient if has or gradient.any() else None
        optimizer.step()
        optimizer.zero_grad()
        self.trainer.set_learning_rate(self.next_step)
        self.version += 1
        if update.then:
            update.then(self.trainer.models)
