"""A generative adversarial network: two models, each with updates and an optimizer of its own.

    discriminator: tell real samples from the generator's   (as many updates a step as asked for)
    generator:     be taken for real
    average:       follows the generator's weights; what is drawn and measured is its work

Every random number is the batch's, a function of (seed, step): so ranks, micro-batches and resuming
change nothing. Sources: Goodfellow et al. 2014 (1406.2661); hinge: Lim & Ye 2017 (1705.02894);
WGAN-GP: Gulrajani et al. 2017 (1704.00028); averaged generators: Yazici et al. 2018 (1806.04498);
Fréchet distance: Heusel et al. 2017 (1706.08500); precision and recall: Kynkäänniemi et al. 2019
(1904.06991).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dtrain.config.user_code import error_in_words
from dtrain.data.images import Ring, Samples
from dtrain.data.seeded import generator, shuffled_rows
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory
from dtrain.task.base import LossUpdate, Sizes, Task, as_weights, wide
from dtrain.task.batch import Batch, Models, Sums
from dtrain.task.pictures import image_grid, points
from dtrain.task.sample_quality import frechet_distance, precision_recall

# By name: the loss of scores that should be high (real), and of those that should be low. Both are
# summed.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "non_saturating": (lambda high: F.softplus(-high).sum(), lambda low: F.softplus(low).sum()),
    "hinge": (lambda high: F.relu(1 - high).sum(), lambda low: F.relu(1 + low).sum()),
    "wgan_gp": (lambda high: -high.sum(), lambda low: low.sum()),
}
COVERED = 0.25  # a mode is covered that gets this share of what is its due
NEAR = 3.0  # deviations from a centre within which a point is one of its mode
FEWEST = 3  # samples of a class, for the classifier whose features tell a Fréchet distance
DRAWN = 64  # samples in a picture


class GAN(Task):
    """Batches: real0 ..., labels0 ..., noise0 ..., mix0 ... for each of the discriminator's
    updates; noise, labels.

    Args:
        loss: non_saturating, hinge or wgan_gp.
        discriminator_steps: updates of the discriminator before each of the generator's.
        penalty: weight of WGAN-GP's gradient penalty.
        average: share of the averaged generator that stays at a step; 0: it is the generator
            itself.
        conditional: give both models the samples' classes.
        samples: drawn and measured in an evaluation, rounded up to whole batches.

    Raises:
        ValueError: models that do not fit the samples or each other, or an unknown loss.
    """

    def __init__(
        self,
        models: dict[str, ModelFactory],
        data: Samples,
        sizes: Sizes,
        *,
        loss: str = "non_saturating",
        discriminator_steps: int = 1,
        penalty: float = 10.0,
        average: float = 0.99,
        conditional: bool = False,
        samples: int = 512,
    ) -> None:
        if set(models) != {"generator", "discriminator"}:
            raise ValueError(
                f"task gan trains generator and discriminator, the configuration has "
                f"{', '.join(models)}: "
                f"use model=gan_ring, gan_digits, gan_mnist or gan_mlp"
            )
        if loss not in LOSSES:
            raise ValueError(f"task.loss={loss} is unknown: use {', '.join(LOSSES)}")
        if discriminator_steps < 1 or not 0 <= average < 1:
            raise ValueError(
                f"task.discriminator_steps={discriminator_steps} must be at least 1, and "
                f"task.average="
                f"{average} from 0 to less than 1"
            )
        if conditional and not data.classes:
            raise ValueError(f"task.conditional=true: data {data.name} bears no classes")
        self.data, self.sizes, self.conditional, self.penalty = data, sizes, conditional, penalty
        self.real, self.fake = LOSSES[loss]
        if samples < 2:
            raise ValueError(f"task.samples={samples} must be at least 2, to measure by")
        self.samples = -(-samples // sizes.global_batch_size) * sizes.global_batch_size
        self.noise = self._check(models)
        self._check_features()
        self.models = dict(models)
        if average:  # made of the same seed and names: it begins as the generator
            self.models["average"] = models["generator"]
        self.shown = "average" if average else "generator"
        then = (
            partial(move_towards, leader="generator", follower="average", stays=average)
            if average
            else None
        )
        self.steps = discriminator_steps
        self.loss, self.penalised = loss, loss == "wgan_gp"
        self.updates = (
            *(
                LossUpdate(
                    "discriminator",
                    partial(self._discriminate, str(index)),
                    self._count,
                    measures=lambda models, batch: {},
                    second_order=self.penalised,
                )
                for index in range(self.steps)
            ),
            LossUpdate(
                "generator", self._generate, self._count, measures=self._measures, then=then
            ),
        )

    def _check(self, models: dict[str, ModelFactory]) -> int:
        """Do the models fit the samples? Returns the size of the noise."""
        generator_, discriminator = (
            on_meta(models[name]) for name in ("generator", "discriminator")
        )
        classes = len(self.data.classes) if self.conditional else 0
        for name, model in (("generator", generator_), ("discriminator", discriminator)):
            has = getattr(model, "classes", classes)
            if has != classes:
                raise ValueError(
                    f"model.{name}.classes={has}: the task needs {classes} (task.conditional="
                    f"{str(self.conditional).lower()})"
                )
        noise = getattr(generator_, "inputs", None)
        if generator_ is None or discriminator is None or noise is None:
            raise ValueError(
                "task gan needs models with shapes: a generator that says its `inputs`"
            )
        given = (torch.zeros(2, dtype=torch.long, device="meta"),) if classes else ()
        try:
            made = generator_(torch.empty(2, noise, device="meta"), *given)
            scores = discriminator(torch.empty(2, *self.data.shape, device="meta"), *given)
        except Exception as error:  # of a user's model: it may fail in any way
            raise ValueError(
                f"the models do not take samples of {self.data.shape}: {error_in_words(error)}"
            ) from error
        if tuple(made.shape[1:]) != self.data.shape:
            raise ValueError(
                f"model.generator makes {tuple(made.shape[1:])}, the samples of "
                f"{self.data.name} are "
                f"{self.data.shape}"
            )
        if tuple(scores.shape) != (2, 1):
            raise ValueError(
                f"model.discriminator.outputs={scores.shape[-1]}: a discriminator gives one score "
                f"a sample"
            )
        return noise

    def _check_features(self) -> None:
        """Can a classifier of the samples be trained, to measure by?"""
        classes = self.data.classes
        if not isinstance(self.data, Ring) and classes:
            counts = self.data.split["train"][1].bincount(minlength=len(classes))
            least = int(counts.argmin())
            if len(counts) < 2 or counts[least] < FEWEST:
                raise ValueError(
                    f"data {self.data.name}: {counts[least]} samples of class {classes[least]} "
                    f"to learn: "
                    f"two or more classes need {FEWEST} each, to measure by"
                )

    @property
    def epoch(self) -> float:
        return len(self.data.split["train"][0]) / self.steps

    def batch(self, step: int) -> Batch:
        values, labels = self.data.split["train"]
        rows, chance = self.sizes.global_batch_size, generator(self.sizes.seed, "gan", step)
        batch = self._drawn(rows, chance)
        for index in range(self.steps):
            chosen = shuffled_rows(step * self.steps + index, rows, len(values), self.sizes.seed)
            batch |= {
                f"real{index}": values[chosen],
                f"labels{index}": labels[chosen],
                f"noise{index}": torch.randn(rows, self.noise, generator=chance),
                f"mix{index}": torch.rand(rows, generator=chance),
            }
        return batch

    def validation(self) -> Iterator[Batch]:
        rows = self.sizes.global_batch_size
        for index in range(self.samples // rows):
            drawn = self._drawn(rows, generator(0, "gan", "validation", index))
            yield drawn | {"place": torch.arange(index * rows, (index + 1) * rows)}

    def size(self, batch: Batch) -> int:
        return len(batch["noise"])

    def describe(self, totals: Sums) -> dict[str, float]:
        if isinstance(self.data, Ring):
            distances = torch.cdist(totals["samples"], self.data.centres.double())
            nearest, mode = distances.min(1)
            good = nearest < NEAR * self.data.deviation
            counts = torch.bincount(mode[good], minlength=len(self.data.centres))
            due = len(nearest) / len(counts)
            return {
                "modes": float((counts >= COVERED * due).sum()),
                "good": float(good.double().mean()),
            }
        if not self.data.classes:
            return {}
        real, made = (
            self.data.features(v)
            for v in (self.data.split["validation"][0][: self.samples], totals["samples"])
        )
        precision, recall = precision_recall(real, made)
        return {"frechet": frechet_distance(real, made), "precision": precision, "recall": recall}

    def pictures(self, totals: Sums) -> dict[str, Figure]:
        if isinstance(self.data, Ring):
            return {"samples": points(totals["samples"], self.data.split["validation"][0])}
        return {"samples": image_grid(totals["samples"][:DRAWN].view(-1, *self.data.shape))}

    def _drawn(self, rows: int, chance: torch.Generator) -> Batch:
        labels = torch.randint(max(1, len(self.data.classes)), (rows,), generator=chance)
        return {"noise": torch.randn(rows, self.noise, generator=chance), "labels": labels}

    def _discriminate(self, index: str, models: Models, batch: Batch) -> Tensor:
        real, labels, noise, mix = (
            batch[f"{name}{index}"] for name in ("real", "labels", "noise", "mix")
        )
        discriminator, given = models["discriminator"], self._given(labels)
        with torch.no_grad():
            fake = models["generator"](as_weights(noise, models["generator"]), *given)
        real = real.to(fake.dtype)
        scores = discriminator(torch.cat((real, fake)), *self._given(labels.repeat(2)))
        high, low = wide(scores).split(len(real))
        loss = self.real(high) + self.fake(low)
        if self.penalised:
            shares = mix.to(fake.dtype).view(-1, *[1] * (fake.ndim - 1))
            between = (shares * real + (1 - shares) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(
                discriminator(between, *given).sum(), between, create_graph=True
            )
            loss = loss + self.penalty * (wide(slope).flatten(1).norm(dim=1) - 1).square().sum()
        return loss

    def _generate(self, models: Models, batch: Batch) -> Tensor:
        given = self._given(batch["labels"])
        made = models["generator"](as_weights(batch["noise"], models["generator"]), *given)
        scores = wide(models["discriminator"](made, *given))
        return self.real(scores) if self.loss == "non_saturating" else -scores.sum()

    def _given(self, labels: Tensor) -> tuple[Tensor, ...]:
        return (labels,) if self.conditional else ()

    def _count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["noise"]))

    def _measures(self, models: Models, batch: Batch) -> Sums:
        """Each sample at its place among all that are drawn: so the sum over the ranks has them
        all.
        """
        noise = as_weights(batch["noise"], models[self.shown])
        made = models[self.shown](noise, *self._given(batch["labels"])).flatten(1).double()
        samples = made.new_zeros(self.samples, made.shape[1])
        samples[batch["place"]] = made
        return {"samples": samples, "count": self._count(batch)}


@torch.no_grad()
def move_towards(models: Models, *, leader: str, follower: str, stays: float) -> None:
    """Move the follower's weights towards the leader's: each rank its own parts of them."""
    for ours, theirs in zip(
        models[follower].parameters(), models[leader].parameters(), strict=True
    ):
        ours.lerp_(theirs.detach().to(ours.dtype), 1 - stays)
    for held, given in zip(models[follower].buffers(), models[leader].buffers(), strict=True):
        held.copy_(given)
