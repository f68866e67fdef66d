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
from dtrain.parallel.optimizer import lr_factor
from dtrain.parallel.plan import Plan
from dtrain.parallel.spans import EXCHANGE, FIGURES, FORWARD_BACKWARD, OPTIMIZER
from dtrain.parallel.training_state import TrainingState
from dtrain.parallel.unused_parameters import UnusedParameters
from dtrain.task.base import Task, Update
from dtrain.task.batch import Batch, evaluating

Phase = Callable[[str], AbstractContextManager[object]]  # by which instruments follow the loop


class NonFinite(ArithmeticError):
    """A loss or a gradient norm is not finite; training cannot go on."""


@dataclass(frozen=True)
class Settings:
    """The loop's sizes and schedule.

    Args:
        steps: optimizer steps of the run.
        seed: of weights, batches and dropout.
        global_batch_size: rows of a step, over all ranks.
        micro_batch_size: rows of a forward pass, per rank; None: all of the rank's rows.
        warmup_steps: of linear warm-up of the learning rate.
        min_lr_ratio: learning rate at the end of the cosine, over the highest.
    """

    steps: int
    seed: int = 0
    global_batch_size: int = 8
    micro_batch_size: int | None = None
    warmup_steps: int = 0
    min_lr_ratio: float = 1.0


@dataclass(frozen=True)
class Step:
    """The figures of one step, the same on every rank except the two that are times.

    Args:
        step: optimizer steps done, from 1.
        loss: the mean over the global batch's items, summed over the models; of a model with
            several updates the last one's.
        grad_norm: over all models, before clipping.
        lr: of the first model's first parameter group.
        tokens: since the first step of the first run.
        tokens_per_second: of this step, by this rank's time.
        step_seconds: this rank's time from asking for the batch to the optimizer's end, without
            evaluation and checkpoints.
        losses: by the model that each one trains.
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
        """Return all figures, flat; the losses by model only where there are several."""
        flat = {key: value for key, value in asdict(self).items() if key != "losses"}
        return flat | (
            {f"loss_{k}": v for k, v in self.losses.items()} if len(self.losses) > 1 else {}
        )


class Trainer(TrainingState):
    """The loop over a `TrainingState`.

    Collective: every rank makes one and calls each method, in the same order.

    Args:
        task, plan, optimizer: see `TrainingState`.
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
        super().__init__(task, plan, optimizer, micro_batches, settings.seed)
        self.settings, self.phase = settings, phase
        self._unused = {n: UnusedParameters(self.models[n], plan) for n in self.optimizers}
        self._step_aware = {
            n: [m for m in model.modules() if isinstance(m, StepAware)]
            for n, model in self.models.items()
        }

    def steps(self) -> Iterator[Step]:
        """Train to the last step; yield the figures of each.

        Raises:
            NonFinite: names the step, the ranks and the batch. The weights are those before the
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
        own_rows = self.plan.shard(batch)
        seed_step(self.settings.seed, step, *self.plan.coordinates)
        self.set_learning_rate(step)
        losses: dict[str, float] = {}
        norms: dict[str, float] = {}
        for update in self.task.updates:
            scale = loss_scale(update, batch, self.plan.batch_parts).to(self.plan.device)
            model = self.models[update.trains]
            for module in self._step_aware[update.trains]:
                module.before_step(scale)
            unused = self._unused[update.trains] if self._executor.leaves_gradients else None
            self.plan.begin_update(self.models)
            with self.phase(FORWARD_BACKWARD):
                part = self._executor.train(update, own_rows, scale)
            with self.phase(EXCHANGE):
                if unused:
                    unused.fill()
                self.plan.reduce_gradients(model)
            with self.phase(FIGURES):
                if unused:
                    unused.drop_unused()
                loss = self.plan.total(part.clone()).item() / self.plan.batch_parts
                engine_norm = self._executor.norm(update.trains)
                norm = (
                    clip_gradients(model, self.plan) if engine_norm is None else engine_norm
                ).item()
            if not (
                math.isfinite(loss)
                and (math.isfinite(norm) or self._executor.skips_nonfinite_steps)
            ):
                raise NonFinite(self._describe_nonfinite(step, update, part, loss, norm))
            with self.phase(OPTIMIZER):
                self._executor.step(update.trains, self.optimizers[update.trains])
            for module in self._step_aware[update.trains]:
                module.after_step(self.plan.sum_over_batch_parts)
            for any_model in self.models.values():
                any_model.zero_grad()
            if update.then:
                update.then(self.models)
            # a model with several updates: of its last
            losses[update.trains], norms[update.trains] = loss, norm
        return losses, norms

    def set_learning_rate(self, step: int) -> None:
        """Set the rates of all optimizers to those of a step."""
        s = self.settings
        factor = lr_factor(step, s.steps, warmup_steps=s.warmup_steps, min_lr_ratio=s.min_lr_ratio)
        for name, optimizer in self.optimizers.items():
            for group, base in zip(optimizer.param_groups, self._base_rates[name], strict=True):
                group["lr"] = base * factor

    def _describe_nonfinite(
        self, step: int, update: Update, part: Tensor, loss: float, norm: float
    ) -> str:
        """Say which ranks' parts of the batch gave a loss that is not finite. Collective."""
        nonfinite = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=part.device)
        nonfinite[dist.get_rank()] = 0.0 if part.isfinite() else 1.0
        dist.all_reduce(nonfinite)
        ranks = [str(rank) for rank, is_nonfinite in enumerate(nonfinite.tolist()) if is_nonfinite]
        where = f"on rank {', '.join(ranks)}" if ranks else "on no rank's loss alone"
        return (
            f"step {step + 1}: loss {loss:g}, gradient norm {norm:g} of {update.trains!r} "
            f"({where}; batch {step} of seed {self.settings.seed}): training stops before this "
            "update; try a lower optimizer.lr or more lr_schedule.warmup_steps"
        )

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics on its validation batches; empty if there are none."""
        totals = self.totals()
        return self.task.describe(totals) if totals else {}

    def totals(self) -> dict[str, Tensor]:
        """Return the sums of each measure over the validation batches, the same on every rank.

        In fp64 on the host; empty if no item counts.
        """
        sums: dict[str, Tensor] = {}
        with evaluating(self.models):
            self.plan.begin_update(self.models)
            for batch in self.task.validation():
                for update in self.task.updates:
                    measured = self._executor.evaluate(update, self.plan.shard(batch))
                    for name, value in measured.items():
                        value = self.plan.total(value.to(self.plan.device, torch.float64))
                        sums[name] = sums.get(name, torch.zeros_like(value)) + value
        self.plan.after_evaluation(self.models)
        for unused in self._unused.values():
            unused.check_units()
        return {name: total.cpu() for name, total in sums.items()} if sums and sums["count"] else {}


def seed_step(seed: int, step: int, part: int, stage: int) -> None:
    """Set all generators by (seed, step, part of the batch, stage of the model) alone.

    So dropout draws the same in a resumed run, and on ranks that compute the same: along tp, where
    other masks would let the ranks' activations drift apart.
    """
    seed_everything(hash((seed, step, part, stage)) % 2**63)


def loss_scale(update: Update, batch: Batch, parts: int) -> Tensor:
    """Return the factor from the summed loss of one part of a batch to the global mean.

    It is in fp64, since it multiplies every gradient: rounding it would scale all of them.
    """
    return parts / update.count(batch).clamp(min=1).double()
