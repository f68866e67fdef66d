"""Pictures that tasks draw of what they have measured; without a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST, NUMBERED = 20.0, 40  # inches of a side; classes whose cells have room for numbers


def confusion_matrix(counts: Tensor, classes: Sequence[str]) -> Figure:
    """Shares of each true class, with the counts in the cells: (K, K)."""
    side = min(2.5 + 0.45 * len(classes), LARGEST)
    figure = _figure(figsize=(side, side))
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(classes) > NUMBERED:  # too many to name
        axes.set(xlabel="said", ylabel="true")
        return figure
    for (row, column), share in zip(
        ((r, c) for r in range(len(classes)) for c in range(len(classes))),
        shares.flatten().tolist(),
        strict=True,
    ):
        if number := int(counts[row, column]):
            axes.text(
                column,
                row,
                str(number),
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
                size=8,
            )
    # names, and no formulas
    axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set(xlabel="said", ylabel="true")
    return figure


def write(folder: Path, step: int, figures: dict[str, Figure]) -> None:
    """Save each as `<folder>/<name>-<step>.png`."""
    for name, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}-{step:06d}.png", dpi=120)


def image_grid(images: Tensor) -> Figure:
    """Images in a square, as many as there are: (N, C, H, W), values from -1 to 1."""
    images = ((images.double().cpu() + 1) / 2).clamp(0, 1)
    side = math.ceil(len(images) ** 0.5)
    figure = _figure(figsize=(6, 6))
    for place, image in enumerate(images):
        axes = figure.add_subplot(side, side, place + 1)
        axes.imshow(
            (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy(),
            cmap="gray",
            vmin=0,
            vmax=1,
        )
        axes.set_axis_off()
    return figure


def points(made: Tensor, real: Tensor) -> Figure:
    """Points of the plane, over the real ones: (N, 2), (M, 2)."""
    figure = _figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.scatter(real[:, 0].tolist(), real[:, 1].tolist(), s=2, color="#bbbbbb", label="real")
    axes.scatter(made[:, 0].tolist(), made[:, 1].tolist(), s=4, color="#e45756", label="made")
    axes.set_aspect("equal")
    axes.legend(loc="upper right")
    return figure


def _figure(**settings: Any) -> Figure:
    from matplotlib.figure import Figure  # a second, which only those wait who draw

    return Figure(layout="constrained", **settings)
