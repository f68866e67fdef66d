"""Small tasks with no data, and one run of each under any plan: what the proofs are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.batch import Batch, Models
from dtrain.layout import Layout
from dtrain.model.transformer import Transformer
from dtrain.optimizer import parameter_groups
from dtrain.plan import Plan
from dtrain.precision import Precision
from dtrain.strategy.base import Strategy
from dtrain.strategy.ddp import DDP
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.replicate import Replicate
from dtrain.task.base import LossUpdate, Supervised, Task
from dtrain.task.causal_lm import IGNORE, correct, cross_entropy, valid
from dtrain.train import Settings, Trainer

VOCAB, CONTEXT = 61, 12  # 61 rows do not divide by 2, 3 or 4: shards are uneven
ROWS = 12


class NextToken(Task):
    """Random tokens; every target counts."""

    causal = True

    def __init__(self, rows: int = ROWS, **model: Any) -> None:
        self.rows = rows
        settings = {"d_model": 24, "n_layers": 2, "n_heads": 4, "bias": False, "causal": self.causal, **model}
        self.models = {"model": partial(Transformer, VOCAB, CONTEXT, **settings)}
        self.updates = (Supervised("model", ("tokens", "positions"), cross_entropy, valid, correct),)

    def batch(self, step: int) -> Batch:
        tokens = torch.randint(1, VOCAB, (self.rows, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
        return self._with_positions(tokens[:, :-1], tokens[:, 1:])

    def _with_positions(self, tokens: Tensor, targets: Tensor) -> Batch:
        positions = torch.arange(CONTEXT).expand(len(tokens), -1)
        return {"tokens": tokens, "positions": positions, "targets": targets.contiguous()}

    def validation(self) -> list[Batch]:
        return [self.batch(10_000), self.batch(10_001)]

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()


class MaskedToken(NextToken):
    """An encoder that finds hidden tokens: from 5 % to 60 % of a row, so that ranks count differently."""

    causal = False

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(1, VOCAB, (self.rows, CONTEXT), generator=generator)
        share = torch.linspace(0.05, 0.6, self.rows)[:, None]
        hidden = torch.rand(tokens.shape, generator=generator) < share
        return self._with_positions(tokens.masked_fill(hidden, 0), tokens.masked_fill(~hidden, IGNORE))


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
        self.models = {"discriminator": partial(MLP, 6, 10, 1), "generator": partial(MLP, 3, 10, 6)}
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


def _bce(logits: Tensor, real: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real), reduction="sum")


TASKS: dict[str, type[Task]] = {"next_token": NextToken, "masked_token": MaskedToken, "gan": GAN}

STRATEGIES: dict[str, list[partial[Strategy]]] = {
    "single": [],
    "ddp": [partial(DDP)],
    "ddp_small_buckets": [partial(DDP, bucket_mb=0.001)],
    "replicate": [partial(Replicate)],
    "fsdp": [partial(FSDP)],
    "fsdp_reduce_each": [partial(FSDP, reduce_each=True)],
    "fsdp_offload": [partial(FSDP, cpu_offload=True)],
    "zero2": [partial(FSDP, reshard_after_forward=False)],
    "hsdp": [partial(Replicate, 2), partial(FSDP)],
    "hsdp_zero2": [partial(Replicate, 2), partial(FSDP, reshard_after_forward=False)],
}


@dataclass(frozen=True)
class Case:
    task: str
    strategy: str
    dtype: str = "fp64"
    micro_batch_size: int | None = None
    clip_norm: float | None = 1.0
    steps: int = 20
    recompute: bool = False
    compile: bool = False
    model: tuple[tuple[str, Any], ...] = ()


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model), lr=3e-3, betas=(0.9, 0.95), fused=True)


def trainer(case: Case, world_size: int) -> Trainer:
    task = TASKS[case.task](**dict(case.model))
    strategies = [make() for make in STRATEGIES[case.strategy]]
    plan = Plan.of(strategies, world_size, precision=Precision(case.dtype), recompute=case.recompute,
                   compile=case.compile).connect()  # fmt: skip
    settings = Settings(case.steps, global_batch_size=ROWS, micro_batch_size=case.micro_batch_size,
                        clip_norm=case.clip_norm, warmup_steps=3, final_ratio=0.1)  # fmt: skip
    return Trainer(task, plan, adamw, settings)


def train(case: Case, world_size: int) -> Outcome:
    """Train the case; every rank calls it."""
    made = trainer(case, world_size)
    outcome = Outcome()
    for step in made.steps():
        outcome.losses.append(step.loss)
        outcome.norms.append(step.grad_norm)
    outcome.metrics = made.evaluate()
    outcome.weights = {name: whole(t).clone() for name, t in made.state().items()}
    return outcome


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
