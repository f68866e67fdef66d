"""Small tasks with no data, and one run of each under any plan: what the proofs are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.model.layout import Layout
from dtrain.model.transformer import Transformer
from dtrain.parallel.clip import clip_gradients
from dtrain.parallel.optimizer import parameter_groups
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Strategy, full_tensor
from dtrain.run import checkpoint_files
from dtrain.run.checkpoint_files import verify
from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.context.strategy import ContextParallel
from dtrain.strategy.ddp import DDP
from dtrain.strategy.expert import ExpertParallel
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.pipeline.strategy import SCHEDULES, PipelineParallel
from dtrain.strategy.replicate import Replicate
from dtrain.strategy.tensor.strategy import TensorParallel
from dtrain.strategy.zero1 import Zero1
from dtrain.task.base import LossUpdate, Supervised, Task
from dtrain.task.batch import Batch, Models, pieces
from dtrain.task.causal_lm import IGNORE, count_correct, count_targets, cross_entropy
from dtrain.train import Settings, Trainer

# 61 rows do not divide by 2, 3 or 4: shards are uneven; 24 tokens do, twice over
VOCAB, CONTEXT = 61, 24
ROWS = 12
# Rounding alone: sums are taken in another order. fp64 has 1.1e-16, fp32 6e-8; twenty Adam steps
# carry it on.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}


class NextToken(Task):
    """Random tokens; every target counts."""

    causal = True

    def __init__(self, rows: int = ROWS, **model: Any) -> None:
        self.rows = rows
        settings = {
            "d_model": 24,
            "n_layers": 2,
            "n_heads": 12,
            "bias": False,
            "causal": self.causal,
            **model,
        }
        self.models = {"model": partial(Transformer, VOCAB, CONTEXT, **settings)}
        self.updates = (
            Supervised(
                "model", ("tokens", "positions"), cross_entropy, count_targets, count_correct
            ),
        )

    def batch(self, step: int) -> Batch:
        tokens = torch.randint(
            1, VOCAB, (self.rows, CONTEXT + 1), generator=torch.Generator().manual_seed(step)
        )
        return self._with_positions(tokens[:, :-1], tokens[:, 1:])

    def _with_positions(self, tokens: Tensor, targets: Tensor) -> Batch:
        positions = torch.arange(CONTEXT).expand(len(tokens), -1)
        return {"tokens": tokens, "positions": positions, "targets": targets.contiguous()}

    def validation(self) -> list[Batch]:
        return [self.batch(10_000), self.batch(10_001)]

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()


class MaskedToken(NextToken):
    """An encoder that finds hidden tokens: from 5 % to 60 % of a row, so that ranks count
    differently.
    """

    causal = False

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(1, VOCAB, (self.rows, CONTEXT), generator=generator)
        share = torch.linspace(0.05, 0.6, self.rows)[:, None]
        hidden = torch.rand(tokens.shape, generator=generator) < share
        return self._with_positions(
            tokens.masked_fill(hidden, 0), tokens.masked_fill(~hidden, IGNORE)
        )


class MLP(nn.Module):
    layout = Layout(column=("up",), row=("down",))

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GAN(Task):
    """Two models, two updates a step; no `initial`, so the models are built whole."""

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows
        self.models = {"discriminator": partial(MLP, 6, 12, 1), "generator": partial(MLP, 3, 12, 6)}
        self.updates = (
            LossUpdate("discriminator", self._discriminate, self._count),
            LossUpdate("generator", self._generate, self._count),
        )

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        real = torch.randn(self.rows, 6, generator=generator, dtype=torch.float64) + 2
        noise = torch.randn(self.rows, 3, generator=generator, dtype=torch.float64)
        return {"real": real, "noise": noise}

    def size(self, batch: Batch) -> int:
        return len(batch["real"])

    def _count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["real"]))

    def _discriminate(self, models: Models, batch: Batch) -> Tensor:
        real, noise = self._as_weights(models, batch)
        with torch.no_grad():
            fake = models["generator"](noise)
        return _bce(models["discriminator"](real), 1.0) + _bce(models["discriminator"](fake), 0.0)

    def _generate(self, models: Models, batch: Batch) -> Tensor:
        _, noise = self._as_weights(models, batch)
        return _bce(models["discriminator"](models["generator"](noise)), 1.0)

    def _as_weights(self, models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
        dtype = next(models["generator"].parameters()).dtype
        return batch["real"].to(dtype), batch["noise"].to(dtype)


def find(
    resume: str, run: Path, outputs: Path, *, fallback: bool, note: Callable[[str], object]
) -> Path:
    """The checkpoint that `resume` names, whole and undamaged."""
    return checkpoint_files.first_undamaged(
        checkpoint_files.resume_candidates(resume, run, outputs),
        verify,
        fallback=fallback,
        note=note,
    )


def _bce(logits: Tensor, real: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        logits, torch.full_like(logits, real), reduction="sum"
    )


TASKS: dict[str, type[Task]] = {"next_token": NextToken, "masked_token": MaskedToken, "gan": GAN}

MOE = (("n_experts", 4), ("activation", "swiglu"))

# One axis each, by name: what is paired with what. Degrees are the rest of the world, or set by
# `with_degrees`.
AXES: dict[str, partial[Strategy]] = {
    "ddp": partial(DDP),
    "replicate": partial(Replicate),
    "allreduce": partial(AllReduce),
    "zero1": partial(Zero1),
    "fsdp": partial(FSDP),
    "zero2": partial(FSDP, reshard_after_forward=False),
    "tensor": partial(TensorParallel),
    "tensor_sequence": partial(TensorParallel, sequence_parallel=True),
    "1f1b": partial(PipelineParallel),
    "zbv": partial(PipelineParallel, schedule="zbv"),
    "ring": partial(ContextParallel),
    "ulysses": partial(ContextParallel, method="ulysses"),
    "expert": partial(ExpertParallel),
}

STRATEGIES: dict[str, list[partial[Strategy]]] = {
    "single": [],
    **{name: [make] for name, make in AXES.items()},
    "ddp_small_buckets": [partial(DDP, bucket_mb=0.001)],
    "fsdp_reduce_each": [partial(FSDP, reduce_each=True)],
    "fsdp_offload": [partial(FSDP, cpu_offload=True)],
    "tensor_gathered": [partial(TensorParallel, loss_parallel=False)],
    "ring_unbalanced": [partial(ContextParallel, balanced=False)],
    "hsdp": [partial(Replicate, 2), partial(FSDP)],
    "hsdp_reduce_each": [partial(Replicate, 2), partial(FSDP, reduce_each=True)],
    "hsdp_zero2": [partial(Replicate, 2), partial(FSDP, reshard_after_forward=False)],
    **{s: [partial(PipelineParallel, schedule=s)] for s in SCHEDULES if s not in AXES},
    "split": [partial(PipelineParallel, schedule="gpipe", split=[1, 3], micro_batches=1)],
    "fsdp_tensor": [partial(FSDP), partial(TensorParallel, 2)],
    "replicate_tensor": [partial(Replicate), partial(TensorParallel, 2)],
    "fsdp_context": [partial(FSDP), partial(ContextParallel, 2)],
    "pipeline_fsdp": [partial(PipelineParallel, 2), partial(FSDP)],
    "pipeline_tensor": [partial(PipelineParallel, 2), partial(TensorParallel)],
    "moe_fsdp": [partial(ExpertParallel, 2), partial(FSDP)],
    "hsdp_tensor": [partial(Replicate, 2), partial(FSDP, 2), partial(TensorParallel, 2)],
    "3d": [partial(PipelineParallel, 2), partial(FSDP), partial(TensorParallel, 2)],
    "4d": [
        partial(PipelineParallel, 2),
        partial(FSDP),
        partial(ContextParallel, 2),
        partial(TensorParallel, 2),
    ],
    "pipeline_hsdp": [partial(PipelineParallel, 2), partial(Replicate, 2), partial(FSDP)],
    "zero1_zbv_sequence": [
        partial(PipelineParallel, 2, schedule="zbv"),
        partial(Zero1, 2),
        partial(TensorParallel, 2, sequence_parallel=True),
    ],
}


# Of a strategy that is there in full: the same tensors in the same places, sent otherwise.
VARIANTS = (
    "ddp_small_buckets",
    "fsdp_reduce_each",
    "hsdp_reduce_each",
    "fsdp_offload",
    "hsdp_zero2",
    "ring_unbalanced",
    "tensor_gathered",
    "split",
    "looped_bfs",
    "interleaved_zero_bubble",
    "dualpipev",
    "gpipe",
)


def with_degrees(names: Iterable[str], degree: int) -> list[partial[Strategy]]:
    return [partial(AXES[name], degree) for name in names]


@dataclass(frozen=True)
class Case:
    task: str
    strategy: str  # of STRATEGIES, or several of AXES joined by +, two ranks on each
    dtype: str = "fp64"
    micro_batch_size: int | None = None
    clip_norm: float | None = 1.0
    steps: int = 20
    recompute: bool = False
    compile: bool = False
    model: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """What differs from the defaults, as a test's name has it."""
        told = [self.task, self.strategy]
        for each in fields(self)[2:]:
            if (value := getattr(self, each.name)) != each.default:
                told.append(each.name if value is True else f"{each.name}={value}")
        return " ".join(told).replace("'", "")

    def reference(self) -> Case:
        """The same on one process, as plainly as can be."""
        return replace(
            self, strategy="single", micro_batch_size=None, recompute=False, compile=False
        )


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, before clipping
    # and optimizer states, at the end; what this rank has
    weights: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model), lr=3e-3, betas=(0.9, 0.95), fused=True)


def plan_of(case: Case, world_size: int) -> Plan:
    makers = (
        STRATEGIES.get(case.strategy)
        if "+" not in case.strategy
        else with_degrees(case.strategy.split("+"), 2)
    )
    assert makers is not None, case.strategy
    return Plan.of(
        [make() for make in makers],
        world_size,
        precision=Precision(case.dtype),
        recompute=case.recompute,
        compile=case.compile,
        clip_norm=case.clip_norm,
    )


def refusal(case: Case, world_size: int) -> str:
    """Why this case is not possible, found without any other process; empty if it is."""
    try:
        plan = plan_of(case, world_size)
        plan.check_task(TASKS[case.task](**dict(case.model)))
        plan.micro_batches(ROWS, case.micro_batch_size)
    except ValueError as error:
        return str(error)
    return ""


def trainer(case: Case, world_size: int) -> Trainer:
    task = TASKS[case.task](**dict(case.model))
    settings = Settings(
        case.steps,
        global_batch_size=ROWS,
        micro_batch_size=case.micro_batch_size,
        warmup_steps=3,
        min_lr_ratio=0.1,
    )
    return Trainer(task, plan_of(case, world_size).connect(), adamw, settings)


def train(case: Case, world_size: int) -> Outcome:
    """Train the case; every rank calls it."""
    return finish(trainer(case, world_size))


@lru_cache
def reference(case: Case) -> Outcome:
    """The same case on one process: this one."""
    return train(case.reference(), 1)


def train_or_refuse(case: Case, world_size: int) -> Outcome | str:
    try:
        return train(case, world_size)
    except ValueError as error:
        return str(error)


def draw(makers: dict[str, int]) -> None:
    """Let the strategy `drawn` be these, by their degrees."""
    STRATEGIES["drawn"] = [partial(STRATEGIES[name][0], degree) for name, degree in makers.items()]


def train_drawn(case: Case, makers: dict[str, int], world_size: int) -> Outcome:
    draw(makers)
    return train(case, world_size)


def finish(made: Trainer) -> Outcome:
    """Train to the last step and note what came of it."""
    outcome = Outcome()
    with keeping_gradients(made, outcome):
        for step in made.steps():
            outcome.losses.append(step.loss)
            outcome.norms.append(step.grad_norm)
    outcome.metrics = made.evaluate()
    outcome.weights = {name: full_tensor(t).clone() for name, t in made.state().items()}
    return outcome


@contextmanager
def keeping_gradients(made: Trainer, outcome: Outcome) -> Iterator[None]:
    """Note each gradient when the loop clips it for the first time."""

    def clipping(model: nn.Module, *others: Any) -> Tensor:
        (name,) = (name for name, each in made.models.items() if each is model)
        for piece in pieces(model):
            for parameter_name, parameter in made.plan.unwrap(piece).named_parameters():
                if parameter.grad is not None:
                    outcome.gradients.setdefault(
                        f"{name}.{parameter_name}", full_tensor(parameter.grad).detach().clone()
                    )
        return clip_gradients(model, *others)

    with mock.patch("dtrain.train.clip_gradients", clipping):
        yield


def assert_equal(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    """What a rank got is what one process got: losses, norms, metrics, and each tensor by its
    relative size.
    """
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance)
    assert ours.norms == pytest.approx(theirs.norms, rel=tolerance)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=tolerance)
    for kind in ("gradients", "weights"):
        for name, tensor in getattr(ours, kind).items():
            expected = getattr(theirs, kind)[name]
            difference, size = (tensor - expected).norm().item(), expected.norm().item()
            assert difference <= tolerance * size, (
                f"{kind} of {name}: relative difference {difference / size:.1e}"
            )


def assert_all_equal(ranks: list[Outcome], theirs: Outcome, tolerance: float) -> None:
    """And together the ranks hold every tensor of the one process."""
    for ours in ranks:
        assert_equal(ours, theirs, tolerance)
    for kind in ("gradients", "weights"):
        assert set().union(*(getattr(ours, kind) for ours in ranks)) == set(getattr(theirs, kind))
