"""Draw pictures of a task's measurements, without a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 20.0  # inches of a side
NUMBERED = 40  # most classes whose cells have room for numbers


def draw_confusion_matrix(counts: Tensor, classes: Sequence[str]) -> Figure:
    """Draw the shares of each true class, with the counts in the cells: (K, K)."""
    side = min(2.5 + 0.45 * len(classes), LARGEST)
    figure = _figure(figsize=(side, side))
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) > NUMBERED:  # too many to name
        return figure
    for row, column in product(range(len(classes)), repeat=2):
        if number := int(counts[row, column]):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(number), ha="center", va="center", color=colour, size=8)
    # names are no formulas
    axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    return figure


def save_figures(folder: Path, step: int, figures: dict[str, Figure]) -> None:
    """Save each figure as `<folder>/<name>-<step>.png`."""
    for name, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}-{step:06d}.png", dpi=120)


def draw_images(images: Tensor) -> Figure:
    """Draw images in a square grid: (N, C, H, W), values from -1 to 1."""
    images = ((images.double().cpu() + 1) / 2).clamp(0, 1)
    side = math.ceil(len(images) ** 0.5)
    figure = _figure(figsize=(6, 6))
    for place, image in enumerate(images):
        axes = figure.add_subplot(side, side, place + 1)
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
    return figure


def draw_points(fake: Tensor, real: Tensor) -> Figure:
    """Draw generated points of the plane over real ones: (N, 2), (M, 2)."""
    figure = _figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.scatter(real[:, 0].tolist(), real[:, 1].tolist(), s=2, color="#bbbbbb", label="real")
    axes.scatter(fake[:, 0].tolist(), fake[:, 1].tolist(), s=4, color="#e45756", label="made")
    axes.set_aspect("equal")
    axes.legend(loc="upper right")
    return figure


def _figure(**settings: Any) -> Figure:
    from matplotlib.figure import Figure  # here, since the import takes a second

    return Figure(layout="constrained", **settings)
