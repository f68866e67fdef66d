"""Augmentation: random changes of training samples, drawn from (seed, step, sample) alone.

Sources: EDA, Wei & Zou 2019 (1901.11196: deletion); SpanBERT, Joshi et al. 2019 (1907.10529: spans
of geometric length); cutout, DeVries & Taylor 2017 (1708.04552); mixup, Zhang et al. 2017
(1710.09412).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, float)


class TextChange(ABC):
    """A change of a text's token ids."""

    @abstractmethod
    def __call__(self, ids: Tensor, room: int, hidden: int, chance: torch.Generator) -> Tensor:
        """Change the ids: (N,) -> (M,).

        Args:
            room: ids that fit into the row.
            hidden: the mark in the place of a hidden token.
        """


def augmentations(
    augment: Mapping[str, Any] | None, kinds: type | tuple[type, ...], samples: str
) -> list[Any]:
    """Return the changes that `task.augment` names.

    Args:
        kinds: of changes that the task knows.
        samples: what they change, for messages.

    Raises:
        ValueError: one is of another kind.
    """
    for name, change in (augment or {}).items():
        if not isinstance(change, kinds):
            raise ValueError(
                f"task.augment.{name}: {type(change).__name__} is no change of {samples}"
            )
    return list((augment or {}).values())


class TokenDrop(TextChange):
    """Leave out each token with this probability; at least one stays."""

    def __init__(self, probability: float = 0.1) -> None:
        self.probability = _probability("token_drop", probability)

    def __call__(self, ids: Tensor, room: int, hidden: int, chance: torch.Generator) -> Tensor:
        stays = torch.rand(len(ids), generator=chance) >= self.probability
        return ids[stays] if stays.any() else ids[:1]


class SpanMask(TextChange):
    """Hide spans of tokens, up to this share of the text; their lengths are geometric."""

    def __init__(self, share: float = 0.15, mean_length: float = 3.0) -> None:
        self.share = _probability("span_mask", share, "share")
        self.mean_length = _one_or_more("span_mask.mean_length", mean_length)

    def __call__(self, ids: Tensor, room: int, hidden: int, chance: torch.Generator) -> Tensor:
        read, changed = min(len(ids), room), ids.clone()
        left = int(self.share * read)
        while left > 0:
            length = min(left, 1 + _geometric(1 / self.mean_length, chance))
            start = int(torch.randint(max(1, read - length + 1), (), generator=chance))
            changed[start : start + length] = hidden
            left -= length
        return changed


class TextCrop(TextChange):
    """Begin a text that is too long for its row at a random token, each time at another."""

    def __call__(self, ids: Tensor, room: int, hidden: int, chance: torch.Generator) -> Tensor:
        start = int(torch.randint(max(0, len(ids) - room) + 1, (), generator=chance))
        return ids[start : start + room]


class ImageChange(ABC):
    """A change of an image."""

    @abstractmethod
    def __call__(self, pixels: Tensor, chance: torch.Generator) -> Tensor:
        """Change the image: (C, H, W) -> (C, H, W), values from -1 to 1."""


class Crop(ImageChange):
    """Move the image by up to this many pixels in each direction; the free border is dark."""

    def __init__(self, pixels: int = 1) -> None:
        self.pixels = _one_or_more("crop.pixels", pixels)

    def __call__(self, pixels: Tensor, chance: torch.Generator) -> Tensor:
        down, right = torch.randint(2 * self.pixels + 1, (2,), generator=chance).tolist()
        padded = torch.nn.functional.pad(pixels, [self.pixels] * 4, value=-1.0)
        return padded[:, down : down + pixels.shape[1], right : right + pixels.shape[2]]


class Flip(ImageChange):
    """Mirror left and right with this probability; not for letters and digits."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = _probability("flip", probability)

    def __call__(self, pixels: Tensor, chance: torch.Generator) -> Tensor:
        return pixels.flip(-1) if torch.rand((), generator=chance) < self.probability else pixels


class Cutout(ImageChange):
    """Darken a square of this side at a random place; it may reach over the edge."""

    def __init__(self, side: int = 3) -> None:
        self.side = _one_or_more("cutout.side", side)

    def __call__(self, pixels: Tensor, chance: torch.Generator) -> Tensor:
        changed = pixels.clone()
        top, left = (
            int(torch.randint(1 - self.side, size, (), generator=chance))
            for size in pixels.shape[1:]
        )
        changed[:, max(0, top) : top + self.side, max(0, left) : left + self.side] = -1.0
        return changed


class Mixup:
    """Mix each sample of a batch and its label with another, by shares of Beta(alpha, alpha)."""

    def __init__(self, alpha: float = 0.2) -> None:
        self.alpha = alpha
        if alpha <= 0:
            raise ValueError(f"task.augment.mixup.alpha={alpha} must be more than 0")

    def mix(
        self, pixels: Tensor, targets: Tensor, chance: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix pixels (B, C, H, W) and shares of the classes (B, K); return both."""
        draws = [
            torch._standard_gamma(torch.full((len(pixels),), self.alpha), generator=chance)
            for _ in range(2)
        ]
        share = (draws[0] / (draws[0] + draws[1]).clamp(min=1e-9)).to(pixels.dtype)
        other = torch.randperm(len(pixels), generator=chance)
        wide, narrow = share[:, None, None, None], share[:, None]
        pixels = wide * pixels + (1 - wide) * pixels[other]
        return pixels, narrow * targets + (1 - narrow) * targets[other]


def _geometric(p: float, chance: torch.Generator) -> int:
    """Draw the number of failures before the first success."""
    if p >= 1:
        return 0
    return int(math.log(1 - float(torch.rand((), generator=chance))) / math.log(1 - p))


def _probability(name: str, value: float, key: str = "probability") -> float:
    if not 0 <= value < 1:
        raise ValueError(f"task.augment.{name}.{key}={value} must be at least 0 and less than 1")
    return value


def _one_or_more(key: str, value: Number) -> Number:
    if value < 1:
        raise ValueError(f"task.augment.{key}={value} must be at least 1")
    return value
