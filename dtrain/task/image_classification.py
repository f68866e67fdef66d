"""Classification of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.data.augment import ImageChange, Mixup, augmentations
from dtrain.data.images import Samples
from dtrain.data.seeded import generator, random_subset, shuffled_rows
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory
from dtrain.task.base import Sizes, Supervised, at_least_fp32, check_examples, single_model
from dtrain.task.batch import Batch, Sums
from dtrain.task.classifier import Classifier, confusion


class ImageClassification(Classifier):
    """An image's class. Batches: pixels (B, C, H, W), targets (B, K).

    Targets are shares of the classes; rows of zeros do not count.

    Args:
        examples: labelled images to train on, drawn by the seed; None: all.
        augment: changes of the training images, in order; mixup comes last.

    Raises:
        ValueError: the images have no classes, or the model does not fit them.
    """

    unit = "samples"

    def __init__(
        self,
        models: dict[str, ModelFactory],
        data: Samples,
        sizes: Sizes,
        *,
        examples: int | None = None,
        augment: Mapping[str, ImageChange | Mixup] | None = None,
    ) -> None:
        self.models, self.data, self.sizes, self.classes = models, data, sizes, data.classes
        changes = augmentations(augment, (ImageChange, Mixup), "images")
        self.changes = [change for change in changes if isinstance(change, ImageChange)]
        self.mixup = next((change for change in changes if isinstance(change, Mixup)), None)
        if not data.classes:
            raise ValueError(
                f"data {data.name} bears no classes: put images into a folder for each"
            )
        self._check(single_model(models, "image_classification"))
        check_examples(examples)
        self._train = self._random_samples("train", examples, sizes.seed)
        self.summary = (
            f"trains on {len(self._train[0]):,} of {len(data.split['train'][0]):,} images"
        )
        self.updates = (Supervised("model", ("pixels",), _criterion, _count, _measures),)

    def _check(self, factory: ModelFactory) -> None:
        model, classes = on_meta(factory), len(self.data.classes)
        if model is None:
            return
        try:
            logits = model(torch.empty(2, *self.data.shape, device="meta"))
        except RuntimeError as error:
            raise ValueError(
                f"the model does not take images of {self.data.shape}: {str(error).splitlines()[0]}"
            ) from None
        if logits.shape[-1] != classes:
            raise ValueError(f"model.outputs={logits.shape[-1]}: the images have {classes} classes")

    @property
    def epoch(self) -> float:
        return len(self._train[0])

    def batch(self, step: int) -> Batch:
        values, labels = self._train
        size, seed = self.sizes.global_batch_size, self.sizes.seed
        chosen = shuffled_rows(step, size, len(values), seed)
        pixels, targets = values[chosen], self._shares(labels[chosen])
        if self.changes:
            pixels = torch.stack(
                [self._changed(image, step, place) for place, image in enumerate(pixels)]
            )
        if self.mixup:
            pixels, targets = self.mixup.mix(pixels, targets, generator(seed, "mixup", step))
        return {"pixels": pixels, "targets": targets}

    def validation(self) -> Iterator[Batch]:
        size = self.sizes.global_batch_size
        values, labels = self._random_samples("validation", self.sizes.eval_batches * size, 0)
        for first in range(0, len(values), size):
            pixels = values[first : first + size]
            targets = self._shares(labels[first : first + size])
            missing = size - len(pixels)  # rows that do not count
            yield {
                "pixels": torch.cat((pixels, pixels[:1].expand(missing, -1, -1, -1))),
                "targets": torch.cat((targets, targets.new_zeros(missing, targets.shape[1]))),
            }

    def size(self, batch: Batch) -> int:
        return len(batch["pixels"])

    def _random_samples(self, side: str, number: int | None, seed: int) -> tuple[Tensor, Tensor]:
        """Choose samples of a side at random, since one class's may stand together."""
        values, labels = self.data.split[side]
        order = random_subset(len(values), number, seed)
        return values[order], labels[order]

    def _shares(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, len(self.data.classes)).float()

    def _changed(self, image: Tensor, step: int, place: int) -> Tensor:
        chance = generator(self.sizes.seed, "augment", step, place)
        for change in self.changes:
            image = change(image, chance)
        return image


def _criterion(logits: Tensor, batch: Batch) -> Tensor:
    logits = at_least_fp32(logits)
    return -(batch["targets"].to(logits.dtype) * logits.log_softmax(-1)).sum()


def _count(batch: Batch) -> Tensor:
    return (batch["targets"].sum(1) > 0).sum()


def _measures(logits: Tensor, batch: Batch) -> Sums:
    counts = batch["targets"].sum(1) > 0
    return {"confusion": confusion(logits[counts], batch["targets"][counts].argmax(1))}
