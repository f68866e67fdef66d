"""The loop against one in plain torch that shares nothing with it but the model and the batches.

The other proofs hold a plan against the same Trainer on one process. What is wrong in the loop for
every plan alike is found here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import GAN, ROWS, Case, MaskedToken, plan_of
from torch import Tensor, nn

from dtrain.data.images import Samples
from dtrain.data.text import Text
from dtrain.data.tokenizer import Bytes
from dtrain.data.windows import Windows
from dtrain.model.images import ConvNet
from dtrain.model.transformer import Transformer
from dtrain.parallel.optimizer import parameter_groups
from dtrain.parallel.strategy import full_tensor
from dtrain.task.base import Sizes, Task
from dtrain.task.causal_lm import CausalLM
from dtrain.task.image_classification import ImageClassification
from dtrain.train import Settings, Trainer

Models, Batch = dict[str, nn.Module], dict[str, Tensor]

# Rounding alone, in fp64: torch clips with a norm of norms, and steps each parameter by itself.
TOLERANCE = 1e-12
STEPS, WARMUP, MIN_LR_RATIO = 6, 3, 0.1
RATE, BETAS, EPS, DECAY = 1e-2, (0.8, 0.97), 1e-6, 0.3
IGNORE = -100
LENGTH = 12  # tokens of a row of real text
UNREACHED = 1e6  # a norm that no gradient has


# What a textbook's loop knows of a task. Nothing here is the product's.


@dataclass(frozen=True)
class Book:
    """A task in plain torch.

    Args:
        losses: the mean loss of each model's update, in the order of the updates.
        items: of a batch, for the count of tokens.
        metrics: of an evaluation.
    """

    losses: dict[str, Callable[[Models, Batch], Tensor]]
    items: Callable[[Batch], int]
    metrics: Callable[[Models, list[Batch]], dict[str, float]] = lambda models, batches: {}


@dataclass
class Trace:
    """What came of a run; `tensors`: weights and optimizer states, by the names of a checkpoint."""

    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    cut: set[bool] = field(default_factory=set)  # were gradients clipped? The plain loop's alone


def plain_rate(step: int) -> float:
    """Linear warm-up to the whole rate in `WARMUP` steps, then half a cosine down to its share."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    cosine = math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
    return RATE * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * (1 + cosine) / 2)


def plain_loop(models: Models, book: Book, batches: list[Batch], clip_norm: float | None) -> Trace:
    """Train the models as a textbook does."""
    trace, optimizers = Trace(), {}
    for name in book.losses:
        decayed = [p for p in models[name].parameters() if p.ndim >= 2]
        others = [p for p in models[name].parameters() if p.ndim < 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizers[name] = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step, batch in enumerate(batches):
        losses, norms = {}, []
        for name, optimizer in optimizers.items():
            for model in models.values():
                model.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = plain_rate(step)
            loss = book.losses[name](models, batch)
            loss.backward()
            most = math.inf if clip_norm is None else clip_norm
            norms.append(nn.utils.clip_grad_norm_(models[name].parameters(), most).item())
            trace.cut.add(norms[-1] > most)
            optimizer.step()
            losses[name] = loss.item()
        trace.losses.append(losses)
        trace.norms.append(math.sqrt(sum(norm**2 for norm in norms)))
        trace.rates.append(plain_rate(step))
        trace.tokens.append(book.items(batch) + (trace.tokens[-1] if trace.tokens else 0))
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            trace.tensors[f"{name}.{key}"] = parameter.detach()
            for state, value in optimizers[name].state[parameter].items():
                trace.tensors[f"optimizer.{name}.{key}.{state}"] = value
    return trace


def token_loss(models: Models, batch: Batch) -> Tensor:
    logits = models["model"](batch["tokens"], batch["positions"])
    targets = batch["targets"].flatten()
    total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum()


@torch.no_grad()
def token_metrics(models: Models, batches: list[Batch]) -> dict[str, float]:
    total, right, count = 0.0, 0, 0
    for batch in batches:
        logits = models["model"].eval()(batch["tokens"], batch["positions"])
        for row, targets in zip(logits, batch["targets"], strict=True):
            counts = targets != IGNORE
            total -= row[counts].log_softmax(1).gather(1, targets[counts, None]).sum().item()
            right += int((row[counts].argmax(1) == targets[counts]).sum())
            count += int(counts.sum())
    return {"loss": total / count, "correct": right / count}


def language_metrics(models: Models, batches: list[Batch]) -> dict[str, float]:
    means = token_metrics(models, batches)
    perplexity = math.exp(means["loss"])
    return {"loss": means["loss"], "perplexity": perplexity, "accuracy": means["correct"]}


def image_loss(models: Models, batch: Batch) -> Tensor:
    return F.cross_entropy(models["model"](batch["pixels"]), batch["targets"].double())


@torch.no_grad()
def image_metrics(models: Models, batches: list[Batch]) -> dict[str, float]:
    """Rows without a class fill a batch up: they do not count."""
    total, pairs = 0.0, []
    for batch in batches:
        for pixels, shares in zip(batch["pixels"], batch["targets"].double(), strict=True):
            if shares.any():
                logits = models["model"].eval()(pixels[None])[0]
                total += F.cross_entropy(logits, shares).item()
                pairs.append((int(shares.argmax()), int(logits.argmax())))
    right = sum(truth == said for truth, said in pairs)
    f1 = []
    for kind in sorted({kind for pair in pairs for kind in pair}):
        both = sum(pair == (kind, kind) for pair in pairs)
        f1.append(2 * both / sum((truth == kind) + (said == kind) for truth, said in pairs))
    accuracy, macro_f1 = right / len(pairs), sum(f1) / len(f1)
    return {"loss": total / len(pairs), "accuracy": accuracy, "macro_f1": macro_f1}


def discriminator_loss(models: Models, batch: Batch) -> Tensor:
    """-log D(real) - log(1 - D(G(noise)))"""
    fake = models["generator"](batch["noise"]).detach()
    real_score, fake_score = models["discriminator"](batch["real"]), models["discriminator"](fake)
    return -(real_score.sigmoid().log() + (1 - fake_score.sigmoid()).log()).mean()


def generator_loss(models: Models, batch: Batch) -> Tensor:
    """-log D(G(noise))"""
    return -models["discriminator"](models["generator"](batch["noise"])).sigmoid().log().mean()


GAN_LOSSES = {"discriminator": discriminator_loss, "generator": generator_loss}
BOOKS: dict[str, Book] = {
    "masked_token": Book({"model": token_loss}, lambda b: b["tokens"].numel(), token_metrics),
    "gan": Book(GAN_LOSSES, lambda b: len(b["real"])),
    "causal_lm": Book({"model": token_loss}, lambda b: b["tokens"].numel(), language_metrics),
    "images": Book({"model": image_loss}, lambda b: len(b["pixels"]), image_metrics),
}


# The same tasks as the product has them.


class MadeUp(Text):
    """Random bytes that were never in a file; each is at most two above the one before it."""

    def __init__(self) -> None:
        nowhere: Any = None
        super().__init__("made up", source=nowhere, tokenizer=Bytes(), cache="")

    def windows(self, split: str, *, seq_len: int, seed: int) -> Windows:
        chance = np.random.default_rng(len(split))
        tokens = chance.integers(0, 3, 400).cumsum() % 200 + 32
        return Windows(tokens, seq_len=seq_len, seed=seed)


class Shades(Samples):
    """Small images of three shades."""

    name = "shades"

    def read(self, progress: Callable[[str, int], None]) -> tuple[Tensor, Tensor]:
        self.classes = ["dark", "grey", "light"]
        labels = torch.arange(72) % 3
        noise = torch.randn(72, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        return noise + labels[:, None, None, None] / 2, labels


def shades() -> Shades:
    data = Shades()
    data.prepare(lambda what, done: None)
    return data


def sizes(seed: int = 3) -> Sizes:
    return Sizes(seed, global_batch_size=ROWS, seq_len=LENGTH, eval_batches=2)


def transformer(**settings: Any) -> dict[str, Callable[[], nn.Module]]:
    return {"model": partial(Transformer, 256, LENGTH, 16, 1, 4, **settings)}


def convnet() -> dict[str, Callable[[], nn.Module]]:
    return {"model": partial(ConvNet, 1, 4, 3, width=8, stages=1, normalise=True)}


TASKS: dict[str, Callable[[], Task]] = {
    "masked_token": MaskedToken,
    "gan": GAN,
    "causal_lm": lambda: CausalLM(transformer(bias=False), MadeUp(), sizes()),
    "images": lambda: ImageClassification(convnet(), shades(), sizes()),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    settings = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "fused": True}
    return torch.optim.AdamW(parameter_groups(model), **settings)


def trainer(case: Case, size: int) -> Trainer:
    settings = Settings(
        STEPS,
        global_batch_size=ROWS,
        micro_batch_size=case.micro_batch_size,
        warmup_steps=WARMUP,
        min_lr_ratio=MIN_LR_RATIO,
    )
    return Trainer(TASKS[case.task](), plan_of(case, size).connect(), adamw, settings)


def trained(case: Case, size: int) -> Trace:
    """What our loop makes of the case; every rank calls it."""
    made, trace = trainer(case, size), Trace()
    for step in made.steps():
        assert step.loss == sum(step.losses.values())
        trace.losses.append(step.losses)
        trace.norms.append(step.grad_norm)
        trace.rates.append(step.lr)
        trace.tokens.append(step.tokens)
    trace.metrics = made.evaluate()
    trace.tensors = {name: full_tensor(tensor).clone() for name, tensor in made.state().items()}
    return trace


@lru_cache
def by_the_book(task: str, clip_norm: float | None) -> Trace:
    """What the plain loop makes of the values that a Trainer begins with."""
    fresh = trainer(Case(task, "single"), 1)
    models, book = copy.deepcopy(fresh.models), BOOKS[task]
    batches = [fresh.task.batch(step) for step in range(STEPS)]
    trace = plain_loop(models, book, batches, clip_norm)
    trace.metrics = book.metrics(models, list(fresh.task.validation()))
    return trace


def assert_same(ours: Trace, book: Trace) -> None:
    close = partial(pytest.approx, rel=TOLERANCE, abs=0)
    assert ours.tokens == book.tokens
    assert ours.losses == [close(losses) for losses in book.losses]
    assert ours.norms == close(book.norms)
    assert ours.rates == close(book.rates)
    assert ours.metrics == close(book.metrics)
    assert ours.tensors.keys() == book.tensors.keys()
    for name, expected in book.tensors.items():
        apart, norm = (ours.tensors[name] - expected).norm().item(), expected.norm().item()
        assert apart <= TOLERANCE * norm, f"{name}: relative difference {apart / norm:.1e}"


# Between the norms of their steps, so that some are cut and others are not.
CLIP_NORM = {"masked_token": 0.7, "gan": 1.2, "causal_lm": 0.6, "images": 0.75}


@pytest.mark.parametrize("task", BOOKS)
def test_one_process_trains_as_a_plain_loop_does(task: str, alone) -> None:
    """Losses, norms, rates, tokens, weights, optimizer states, metrics; some gradients are cut."""
    book = by_the_book(task, CLIP_NORM[task])
    assert book.cut == {True, False}, book.norms
    assert_same(trained(Case(task, "single", clip_norm=CLIP_NORM[task]), 1), book)


@pytest.mark.parametrize("task", ["masked_token", "gan"])
def test_micro_batches_are_the_plain_loop_s_whole_batch(task: str, alone) -> None:
    """Micro-batches of masked tokens have different counts; nothing is clipped."""
    ours = trained(Case(task, "single", micro_batch_size=3, clip_norm=None), 1)
    assert_same(ours, by_the_book(task, None))


@pytest.mark.parametrize("task", ["masked_token", "gan"])
def test_a_norm_that_is_not_reached_changes_no_bit(task: str, alone) -> None:
    """Clipping cuts what is too long and never stretches what is short."""
    free, limited = (trained(Case(task, "single", clip_norm=c), 1) for c in (None, UNREACHED))
    assert (free.losses, free.norms) == (limited.losses, limited.norms)
    for name, tensor in free.tensors.items():
        assert torch.equal(limited.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("task", "strategy", "micro_batch_size"),
    [
        ("masked_token", "ddp", None),
        ("masked_token", "fsdp", 3),
        ("masked_token", "tensor", None),
        ("gan", "ddp", 2),
        ("gan", "fsdp", None),
    ],
)
def test_two_ranks_train_as_a_plain_loop_does(
    task: str, strategy: str, micro_batch_size: int | None, world, alone
) -> None:
    """The oracle has no Trainer, so a fault of the loop cannot stand on both sides."""
    case = Case(task, strategy, micro_batch_size=micro_batch_size, clip_norm=CLIP_NORM[task])
    for ours in world(2).run(trained, case, 2):
        assert_same(ours, by_the_book(task, CLIP_NORM[task]))


def test_the_plain_loop_tells_a_little_of_every_kind_apart(alone) -> None:
    """A norm clipped by a thousandth more, or one number's ninth digit, does not pass."""
    book = by_the_book("gan", CLIP_NORM["gan"])
    with pytest.raises(AssertionError):
        assert_same(trained(Case("gan", "single", clip_norm=CLIP_NORM["gan"] * 0.999), 1), book)
    for name in ("generator.up.weight", "optimizer.discriminator.down.bias.exp_avg_sq"):
        changed = copy.deepcopy(book)
        changed.tensors[name].flatten()[0] *= 1 + 1e-9
        with pytest.raises(AssertionError, match=name):
            assert_same(changed, book)
