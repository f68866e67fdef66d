"""A generative adversarial network: two models, each with updates and an optimizer of its own.

    discriminator: learns to tell real samples from generated ones, in one or more updates a step
    generator:     learns to make samples that are taken for real
    average:       follows the generator's weights; its samples are drawn and measured

Every random number is in the batch, a function of (seed, step): so ranks, micro-batches and
resuming change nothing.

Sources: Goodfellow et al. 2014 (1406.2661); hinge: Lim & Ye 2017 (1705.02894); WGAN-GP: Gulrajani
et al. 2017 (1704.00028); averaged generators: Yazici et al. 2018 (1806.04498); Fréchet distance:
Heusel et al. 2017 (1706.08500); precision and recall: Kynkäänniemi et al. 2019 (1904.06991).
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
from dtrain.task.base import LossUpdate, Sizes, Task, Update, at_least_fp32, in_weight_dtype
from dtrain.task.batch import Batch, Models, Sums
from dtrain.task.pictures import draw_images, draw_points
from dtrain.task.sample_quality import frechet_distance, precision_recall

# By name: the summed loss of scores that should be high (of real samples), and of those that should
# be low.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "non_saturating": (lambda high: F.softplus(-high).sum(), lambda low: F.softplus(low).sum()),
    "hinge": (lambda high: F.relu(1 - high).sum(), lambda low: F.relu(1 + low).sum()),
    "wgan_gp": (lambda high: -high.sum(), lambda low: low.sum()),
}
COVERED = 0.25  # a mode is found if it has this share of the points that it should have
NEAR = 3.0  # deviations from a centre within which a point belongs to its mode
FEWEST = 3  # samples of a class, to train the classifier whose features are compared
DRAWN = 64  # samples in a picture


class GAN(Task):
    """Generator and discriminator. Batches: noise and labels for the generator's update.

    For each of the discriminator's updates real0 ..., labels0 ..., noise0 ..., mix0 ....

    Args:
        loss: non_saturating, hinge or wgan_gp.
        discriminator_steps: updates of the discriminator before each of the generator's.
        penalty: weight of WGAN-GP's gradient penalty.
        average: share of the averaged generator that stays at a step; 0: there is no average.
        conditional: give both models the samples' classes.
        samples: drawn and measured in an evaluation, rounded up to whole batches.

    Raises:
        ValueError: the models do not fit the samples or each other, or a setting is out of range.
    """

    unit = "samples"

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
                f"{', '.join(models)}: use model=gan_ring, gan_digits, gan_mnist or gan_mlp"
            )
        _check_settings(loss, discriminator_steps, average, samples)
        if conditional and not data.classes:
            raise ValueError(f"task.conditional=true: data {data.name} bears no classes")
        self.data, self.sizes, self.conditional, self.penalty = data, sizes, conditional, penalty
        self.loss, self.penalised = loss, loss == "wgan_gp"
        self.real_loss, self.fake_loss = LOSSES[loss]
        self.steps = discriminator_steps
        self.samples = -(-samples // sizes.global_batch_size) * sizes.global_batch_size
        self.noise = self._check_models(models)
        _check_class_sizes(data)
        self.models = dict(models)
        if average:  # it has the same seed and names, so it begins as the generator
            self.models["average"] = models["generator"]
        self.measured = "average" if average else "generator"
        self.updates = self._make_updates(average)

    def _make_updates(self, average: float) -> tuple[Update, ...]:
        discriminator = (
            LossUpdate(
                "discriminator",
                partial(self._discriminate, str(index)),
                self._count,
                measures=lambda models, batch: {},
                second_order=self.penalised,
            )
            for index in range(self.steps)
        )
        then = partial(move_towards, leader="generator", follower="average", stays=average)
        generator = LossUpdate(
            "generator",
            self._generate,
            self._count,
            measures=self._measures,
            then=then if average else None,
        )
        return *discriminator, generator

    def _check_models(self, models: dict[str, ModelFactory]) -> int:
        """Return the size of the noise.

        Raises:
            ValueError: the models do not fit the samples.
        """
        pair = {name: on_meta(models[name]) for name in ("generator", "discriminator")}
        classes = len(self.data.classes) if self.conditional else 0
        for name, model in pair.items():
            if (model_classes := getattr(model, "classes", classes)) != classes:
                raise ValueError(
                    f"model.{name}.classes={model_classes}: the task needs {classes} "
                    f"(task.conditional={str(self.conditional).lower()})"
                )
        generator_, discriminator = pair.values()
        noise: int | None = getattr(generator_, "inputs", None)
        if generator_ is None or discriminator is None or noise is None:
            raise ValueError(
                "task gan needs models with shapes: a generator that says its `inputs`"
            )
        labels = (torch.zeros(2, dtype=torch.long, device="meta"),) if classes else ()
        try:
            samples = generator_(torch.empty(2, noise, device="meta"), *labels)
            scores = discriminator(torch.empty(2, *self.data.shape, device="meta"), *labels)
        except Exception as error:  # of a user's model: it may fail in any way
            raise ValueError(
                f"the models do not take samples of {self.data.shape}: {error_in_words(error)}"
            ) from error
        if tuple(samples.shape[1:]) != self.data.shape:
            raise ValueError(
                f"model.generator makes {tuple(samples.shape[1:])}, the samples of "
                f"{self.data.name} are {self.data.shape}"
            )
        if tuple(scores.shape) != (2, 1):
            raise ValueError(
                f"model.discriminator.outputs={scores.shape[-1]}: a discriminator gives one score "
                f"a sample"
            )
        return noise

    @property
    def epoch(self) -> float:
        return len(self.data.split["train"][0]) / self.steps

    def batch(self, step: int) -> Batch:
        values, labels = self.data.split["train"]
        rows, chance = self.sizes.global_batch_size, generator(self.sizes.seed, "gan", step)
        batch = self._random_inputs(rows, chance)
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
            inputs = self._random_inputs(rows, generator(0, "gan", "validation", index))
            yield inputs | {"place": torch.arange(index * rows, (index + 1) * rows)}

    def size(self, batch: Batch) -> int:
        return len(batch["noise"])

    def describe(self, totals: Sums) -> dict[str, float]:
        if isinstance(self.data, Ring):
            return _modes(totals["samples"], self.data)
        if not self.data.classes:
            return {}
        real = self.data.features(self.data.split["validation"][0][: self.samples])
        fake = self.data.features(totals["samples"])
        precision, recall = precision_recall(real, fake)
        return {"frechet": frechet_distance(real, fake), "precision": precision, "recall": recall}

    def pictures(self, totals: Sums) -> dict[str, Figure]:
        if isinstance(self.data, Ring):
            return {"samples": draw_points(totals["samples"], self.data.split["validation"][0])}
        return {"samples": draw_images(totals["samples"][:DRAWN].view(-1, *self.data.shape))}

    def _random_inputs(self, rows: int, chance: torch.Generator) -> Batch:
        labels = torch.randint(max(1, len(self.data.classes)), (rows,), generator=chance)
        return {"noise": torch.randn(rows, self.noise, generator=chance), "labels": labels}

    def _discriminate(self, index: str, models: Models, batch: Batch) -> Tensor:
        real, labels, noise, mix = (
            batch[f"{name}{index}"] for name in ("real", "labels", "noise", "mix")
        )
        discriminator, classes = models["discriminator"], self._labels(labels)
        with torch.no_grad():
            fake = models["generator"](in_weight_dtype(noise, models["generator"]), *classes)
        real = real.to(fake.dtype)
        scores = discriminator(torch.cat((real, fake)), *self._labels(labels.repeat(2)))
        real_scores, fake_scores = torch.split(at_least_fp32(scores), len(real))
        loss = self.real_loss(real_scores) + self.fake_loss(fake_scores)
        if self.penalised:
            shares = mix.to(fake.dtype).view(-1, *[1] * (fake.ndim - 1))
            between = (shares * real + (1 - shares) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(
                discriminator(between, *classes).sum(), between, create_graph=True
            )
            norms = at_least_fp32(slope).flatten(1).norm(dim=1)
            loss = loss + self.penalty * (norms - 1).square().sum()
        return loss

    def _generate(self, models: Models, batch: Batch) -> Tensor:
        classes = self._labels(batch["labels"])
        noise = in_weight_dtype(batch["noise"], models["generator"])
        fake = models["generator"](noise, *classes)
        scores = at_least_fp32(models["discriminator"](fake, *classes))
        return self.real_loss(scores) if self.loss == "non_saturating" else -scores.sum()

    def _labels(self, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the argument of conditional models."""
        return (labels,) if self.conditional else ()

    def _count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["noise"]))

    def _measures(self, models: Models, batch: Batch) -> Sums:
        """Put each sample at its place among zeros: so the sum over the ranks has all of them."""
        noise = in_weight_dtype(batch["noise"], models[self.measured])
        fake = models[self.measured](noise, *self._labels(batch["labels"])).flatten(1).double()
        samples = fake.new_zeros(self.samples, fake.shape[1])
        samples[batch["place"]] = fake
        return {"samples": samples, "count": self._count(batch)}


@torch.no_grad()
def move_towards(models: Models, *, leader: str, follower: str, stays: float) -> None:
    """Move the follower's weights towards the leader's; each rank moves its own parts."""
    following, leading = models[follower], models[leader]
    for weight, target in zip(following.parameters(), leading.parameters(), strict=True):
        weight.lerp_(target.detach().to(weight.dtype), 1 - stays)
    for buffer, value in zip(following.buffers(), leading.buffers(), strict=True):
        buffer.copy_(value)


def _check_settings(loss: str, discriminator_steps: int, average: float, samples: int) -> None:
    if loss not in LOSSES:
        raise ValueError(f"task.loss={loss} is unknown: use {', '.join(LOSSES)}")
    if discriminator_steps < 1 or not 0 <= average < 1:
        raise ValueError(
            f"task.discriminator_steps={discriminator_steps} must be at least 1, and "
            f"task.average={average} from 0 to less than 1"
        )
    if samples < 2:
        raise ValueError(f"task.samples={samples} must be at least 2, to measure by")


def _check_class_sizes(data: Samples) -> None:
    """Raise ValueError if a class has too few samples for the classifier that measures."""
    classes = data.classes
    if isinstance(data, Ring) or not classes:
        return
    counts = data.split["train"][1].bincount(minlength=len(classes))
    least = int(counts.argmin())
    if len(counts) < 2 or counts[least] < FEWEST:
        raise ValueError(
            f"data {data.name}: {counts[least]} samples of class {classes[least]} to learn: "
            f"two or more classes need {FEWEST} each, to measure by"
        )


def _modes(points: Tensor, ring: Ring) -> dict[str, float]:
    """Return how many modes the points find, and the share of points near a mode."""
    nearest, mode = torch.cdist(points, ring.centres.double()).min(1)
    good = nearest < NEAR * ring.deviation
    counts = torch.bincount(mode[good], minlength=len(ring.centres))
    expected = len(points) / len(counts)
    modes = (counts >= COVERED * expected).sum()
    return {"modes": float(modes), "good": float(good.double().mean())}
