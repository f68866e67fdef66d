"""The training loop. It names no strategy and no task.

batch = task.batch(step) -> plan.shard -> for each update: forward and backward, clip, step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.data.seeded import seed_everything
from dtrain.model.layout import StepAware
from dtrain.parallel.clip import clip_gradients
from dtrain.parallel.optimizer import OPTIMIZER_STATE, lr_factor, named_tensors, restore_state
from dtrain.parallel.plan import Plan
from dtrain.parallel.presence import Presence
from dtrain.parallel.spans import EXCHANGE, FIGURES, FORWARD_BACKWARD, OPTIMIZER
from dtrain.task.base import Task, Update
from dtrain.task.batch import Batch, evaluating, pieces

Phase = Callable[[str], AbstractContextManager]  # told what the loop does: by instruments


class NonFinite(ArithmeticError):
    """A loss or a gradient norm is not a number any more; training cannot go on."""


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know besides its task and its plan."""

    steps: int
    seed: int = 0
    global_batch_size: int = 8
    micro_batch_size: int | None = None
    warmup_steps: int = 0
    min_lr_ratio: float = 1.0


@dataclass(frozen=True)
class Step:
    """The figures of one step, the same on every rank.

    `step` counts optimizer steps done, from 1; `loss` is the mean over the global batch's items,
    summed over the updates; `grad_norm` is the norm before clipping over all models; `tokens`
    counts from the first step of the first run; `step_seconds` is this rank's time from asking for
    the batch to the optimizer's end, evaluation and checkpoints left out.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    step_seconds: float
    losses: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """All of it, flat; the losses by model only where there are several."""
        flat = {key: value for key, value in asdict(self).items() if key != "losses"}
        return flat | (
            {f"loss_{k}": v for k, v in self.losses.items()} if len(self.losses) > 1 else {}
        )


class Trainer:
    """The models of one task under one plan, with their optimizers.

    Making one and every method are collectives: all ranks call them in the same order.

    Args:
        task, plan: what is trained and how; the plan is connected.
        optimizer: makes an optimizer of a model's parameters.
        settings: sizes and schedules.
        phase: entered around each part of a step, by its name.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        optimizer: Callable[[nn.Module], Optimizer],
        settings: Settings,
        phase: Phase = nullcontext,
    ) -> None:
        micro_batches = plan.micro_batches(settings.global_batch_size, settings.micro_batch_size)
        plan.check_updates(task)
        plan.check_optimizer(optimizer, micro_batches)
        self.task, self.plan, self.settings, self.phase = task, plan, settings, phase
        self.models = {
            name: plan.parallelize(factory, settings.seed) for name, factory in task.models.items()
        }
        # a model that only follows another has no optimizer
        trained = {update.trains for update in task.updates}
        self.optimizers = {
            n: plan.optimizer(optimizer(m), m) for n, m in self.models.items() if n in trained
        }
        self._rates = {
            n: [group["lr"] for group in o.param_groups] for n, o in self.optimizers.items()
        }
        self._executor = plan.executor(self.models, self.optimizers, micro_batches)
        self.next_step = self.tokens = 0
        self._presence = {n: Presence(m, plan) for n, m in self.models.items() if n in trained}
        self._aware = {
            n: [m for m in model.modules() if isinstance(m, StepAware)]
            for n, model in self.models.items()
        }

    def steps(self) -> Iterator[Step]:
        """Train to the last step, yielding each one's figures.

        Raises:
            NonFinite: naming the step, the ranks and the batch; the weights are those before the
                update that failed.
        """
        while self.next_step < self.settings.steps:
            step, start = self.next_step, time.perf_counter()
            batch = self.task.batch(step)
            losses, norms = self._train(step, batch)
            if self.plan.device.type == "cuda":
                torch.cuda.synchronize()
            seconds, tokens = time.perf_counter() - start, self.task.size(batch)
            self.tokens, self.next_step = self.tokens + tokens, self.next_step + 1
            lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
            yield Step(
                self.next_step,
                sum(losses.values()),
                math.hypot(*norms.values()),
                lr,
                self.tokens,
                tokens / seconds,
                seconds,
                losses,
            )

    def _train(
        self, step: int, batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        mine = self.plan.shard(batch)
        seed_step(self.settings.seed, step, *self.plan.coordinates)
        self.set_learning_rate(step)
        losses: dict[str, float] = {}
        norms: dict[str, float] = {}
        for update in self.task.updates:
            scale = loss_scale(update, batch, self.plan.batch_parts).to(self.plan.device)
            model = self.models[update.trains]
            for module in self._aware[update.trains]:
                module.before_step(scale)
            presence = self._presence[update.trains] if self._executor.leaves_gradients else None
            self.plan.begin_update(self.models)
            with self.phase(FORWARD_BACKWARD):
                part = self._executor.train(update, mine, scale)
            with self.phase(EXCHANGE):
                if presence:
                    presence.fill()
                self.plan.reduce_gradients(model)
            with self.phase(FIGURES):
                if presence:
                    presence.settle()
                loss = self.plan.total(part.clone()).item() / self.plan.batch_parts
                known = self._executor.norm(update.trains)
                norm = (clip_gradients(model, self.plan) if known is None else known).item()
            if not (
                math.isfinite(loss)
                and (math.isfinite(norm) or self._executor.skips_nonfinite_steps)
            ):
                raise NonFinite(self._blame(step, update, part, loss, norm))
            with self.phase(OPTIMIZER):
                self._executor.step(update.trains, self.optimizers[update.trains])
            for module in self._aware[update.trains]:
                module.after_step(self.plan.sum_over_batch_parts)
            for each in self.models.values():
                each.zero_grad()
            if update.then:
                update.then(self.models)
            # of its last update, if it has several
            losses[update.trains], norms[update.trains] = loss, norm
        return losses, norms

    def set_learning_rate(self, step: int) -> None:
        """Set the rates of all optimizers to those of a step."""
        s = self.settings
        factor = lr_factor(step, s.steps, warmup_steps=s.warmup_steps, min_lr_ratio=s.min_lr_ratio)
        for name, optimizer in self.optimizers.items():
            for group, base in zip(optimizer.param_groups, self._rates[name], strict=True):
                group["lr"] = base * factor

    def _blame(self, step: int, update: Update, part: Tensor, loss: float, norm: float) -> str:
        """Which ranks' parts of the batch gave the loss that is not finite."""
        parts = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=part.device)
        parts[dist.get_rank()] = 0.0 if part.isfinite() else 1.0
        dist.all_reduce(parts)
        ranks = [str(rank) for rank, bad in enumerate(parts.tolist()) if bad]
        where = f"on rank {', '.join(ranks)}" if ranks else "on no rank's loss alone"
        return (
            f"step {step + 1}: loss {loss:g}, gradient norm {norm:g} of {update.trains!r} "
            f"({where}; batch {step} "
            f"of seed {self.settings.seed}): training stops before this update; try a lower "
            f"optimizer.lr or more lr_schedule.warmup_steps"
        )

    def evaluate(self) -> dict[str, float]:
        """The task's metrics on its validation batches; empty if there are none. A collective."""
        totals = self.totals()
        return self.task.describe(totals) if totals else {}

    def totals(self) -> dict[str, Tensor]:
        """The sums of every measure over the validation batches, in fp64 on the host; empty if
        nothing counts.

        A collective; the same on every rank.
        """
        sums: dict[str, Tensor] = {}
        with evaluating(self.models):
            self.plan.begin_update(self.models)
            for batch in self.task.validation():
                for update in self.task.updates:
                    for name, value in self._executor.evaluate(
                        update, self.plan.shard(batch)
                    ).items():
                        value = self.plan.total(value.to(self.plan.device, torch.float64))
                        sums[name] = sums.get(name, torch.zeros_like(value)) + value
        self.plan.after_evaluation(self.models)
        for presence in self._presence.values():
            presence.check_units()
        return {name: total.cpu() for name, total in sums.items()} if sums and sums["count"] else {}

    def state(self) -> dict[str, Tensor]:
        """Every weight, buffer and optimizer state by its full name: the same names and shapes
        under every plan.
        """
        return {name: value for part in self.states() for name, value in part.items()}

    def states(self) -> list[dict[str, Tensor]]:
        """The state of each piece of the models on this rank: two of them may hold copies of
        one weight.
        """
        found = []
        for name, model in self.models.items():
            for tensors in self._tensors(name, model, self.optimizers.get(name)):
                found.append({_within(name, key): value for key, value in tensors.items()})
        return found

    def _tensors(
        self, name: str, model: nn.Module, optimizer: Optimizer | None
    ) -> list[dict[str, Tensor]]:
        if (engine := self._executor.state_tensors(name)) is not None:
            return [engine]
        return [named_tensors(self.plan.unwrap(piece), optimizer) for piece in pieces(model)]

    def held(self, kind: str) -> list[Tensor]:
        """This rank's tensors that are `parameters`, `gradients` or `optimizer`: states."""
        found: list[Tensor] = []
        for name, model in self.models.items():
            kept = self.optimizers[name].state if name in self.optimizers else {}
            states = (value for state in kept.values() for value in state.values())
            own: dict[str, list[Tensor]] = {
                "parameters": list(model.parameters()),
                "gradients": [p.grad for p in model.parameters() if p.grad is not None],
                "optimizer": [value for value in states if isinstance(value, Tensor)],
            }
            found += (self._executor.tensors_by_kind(name) or own)[kind]
        return found

    def begin(self, fill: Callable[[list[dict[str, Tensor]]], None]) -> None:
        """Take weights from elsewhere: `fill` fills some of the tensors it is given.

        Optimizers begin anew.
        """
        states = self.states()
        fill(states)
        for value in (
            t for part in states for key, t in part.items() if key.startswith(OPTIMIZER_STATE)
        ):
            value.zero_()  # an engine's
        self._restore(states)

    def load(self, fill: Callable[[list[dict[str, Tensor]]], None]) -> None:
        """Take weights, buffers and states from a checkpoint. A collective.

        `fill` fills the tensors it is given, and takes away states that the checkpoint's optimizer
        did not have.
        """
        for name, optimizer in self.optimizers.items():
            self._executor.make_states(name, optimizer)
        states = self.states()
        fill(states)
        self._restore(states)

    def _restore(self, states: list[dict[str, Tensor]]) -> None:
        for name, model in self.models.items():
            own = {
                key.replace(f"{name}.", "", 1): value
                for state in states
                for key, value in state.items()
                if key.removeprefix(OPTIMIZER_STATE).startswith(f"{name}.")
            }
            self._executor.load_state_tensors(name, own)
            for piece in pieces(model) if name in self.optimizers else ():
                restore_state(self.plan.unwrap(piece), self.optimizers[name], own)


def seed_step(seed: int, step: int, part: int, stage: int) -> None:
    """Set all generators by (seed, step, part of the batch, stage of the model) alone.

    So dropout draws the same in a resumed run, and on ranks that compute the same: along tp, where
    other masks would let the ranks' activations drift apart.
    """
    seed_everything(hash((seed, step, part, stage)) % 2**63)


def loss_scale(update: Update, batch: Batch, parts: int) -> Tensor:
    """Return the factor that makes the summed loss of one of a batch's parts a mean.

    In fp64: it is no power of two, and every rank's gradient is multiplied by it.
    """
    return parts / update.count(batch).clamp(min=1).double()


def _within(model_name: str, key: str) -> str:
    """The full name of what a model calls `key`."""
    name = key.removeprefix(OPTIMIZER_STATE)
    return f"{OPTIMIZER_STATE if name != key else ''}{model_name}.{name}"
