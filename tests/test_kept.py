"""What is prepared is kept whole: what was cut, damaged or made otherwise is made anew, or
refused where that cannot be.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.data import cache as caches
from dtrain.data.cache import MANIFEST, cached_folder
from dtrain.data.images import Digits, Folder, HubImages, Samples
from dtrain.data.paths import CACHE, find_files
from dtrain.data.prepare import Corpus, prepare
from dtrain.data.rows import Rows
from dtrain.data.sources import Files, HuggingFace, Source
from dtrain.data.stdlib_rows import Functions
from dtrain.data.tokenizer import BPE, Bytes
from dtrain.report.console import preparation_progress
from dtrain.task.base import Sizes
from dtrain.task.batch import Models
from dtrain.task.gan import GAN
from dtrain.task.image_classification import ImageClassification

TEXT = "some words of a text, and some more of them\n" * 40


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[[], Corpus]:
    (tmp_path / "a.txt").write_text(TEXT)
    return lambda: prepare(
        "x", Files(str(tmp_path / "a.txt")), BPE(300), tmp_path / "cache", validation_fraction=0.3
    )


def contents(made: Corpus) -> list[bytes]:
    return [made.tokens(side).tobytes() for side in ("train", "validation")]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def cut_in_copying(file: Path) -> None:
    """By a program that keeps times."""
    cut(file)
    os.utime(file, (1e9, 1e9))


def flip(file: Path) -> None:
    found = bytearray(file.read_bytes())
    found[len(found) // 2] ^= 1
    file.write_bytes(found)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "cut in copying": cut_in_copying,
    "flipped": flip,
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
    "nonsense": lambda file: file.write_bytes(b"[1, 2]\n"),
    "another form": lambda file: file.write_text('{"rows": 3}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["train.bin", "validation.bin", "corpus.json", "tokenizer.json", MANIFEST]
)
def test_what_is_not_as_it_was_written_is_made_anew(
    corpus: Callable[[], Corpus], name: str, damage: str
) -> None:
    first = corpus()
    expected = contents(first)
    DAMAGE[damage](Path(first.folder) / name)
    again = corpus()
    assert contents(again) == expected and again == first
    assert caches.is_complete(Path(first.folder))


@pytest.mark.parametrize("name", ["train.bin", "corpus.json"])
def test_damage_that_cannot_be_mended_is_refused(
    corpus: Callable[[], Corpus], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(Path(corpus().folder) / name)
    read_only(monkeypatch)
    with pytest.raises(
        ValueError,
        match="data.cache=.*is not there, or not whole, and cannot be made .*DTRAIN_CACHE",
    ):
        corpus()


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another user's were all folders: the tests' user may be root, whom no permission
    stops.
    """
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *more, **named)

    def refuse_folder(path: Any, *more: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse_folder)
    monkeypatch.setattr(os, "unlink", refuse_folder)


def test_a_cache_that_cannot_be_written_is_read(
    corpus: Callable[[], Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, or one on a disk that is read-only."""
    first = corpus()
    read_only(monkeypatch)
    assert corpus() == first


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path, corpus: Callable[[], Corpus]) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        ValueError, match=r"data.cache=.*cannot be made \((File exists|Not a directory)"
    ):
        corpus()
    with pytest.raises(ValueError, match=r"data.cache=/proc/1/x: .*cannot be made"):
        prepare("x", Files(str(tmp_path / "a.txt")), Bytes(), "/proc/1/x")


class Growing(Files):
    """Somebody else appends to a file once its first row has been read."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(super().rows()):
            yield row
            if not number:
                with Path(str(self.path)).open("a") as file:
                    file.write('{"text": "late"}\n')

    def rows_with(self, fields: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        return self.rows()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["corpus", "rows"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    kind: str, cached: bool, tmp_path: Path
) -> None:
    """Ranks that read it later would have other rows; and of the cache a name that tells of one
    state, and data of another.
    """
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(40)))

    def read(source: Files) -> object:
        if kind == "corpus":
            return prepare("x", source, Bytes(), cache)
        made = Rows("x", source, Bytes(), cache=str(cache) if cached else None)
        made.prepare(lambda what, done: None)
        return made

    with pytest.raises(
        ValueError, match=r"a.jsonl, of data x, changed while it was read: start again"
    ):
        read(Growing(str(file)))
    assert not list(cache.glob("x-????????????????"))
    assert read(Files(str(file)))


def test_the_lock_of_another_user_serves_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached_folder(tmp_path, "x", dict, lambda folder: None)
    lock, opened = tmp_path / f"{folder.name}.lock", os.open
    assert lock.exists()
    (folder / MANIFEST).unlink()

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path) == str(lock) and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert cached_folder(tmp_path, "x", dict, lambda folder: None) == folder and caches.is_complete(
        folder
    )


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, corpus: Callable[[], Corpus]
) -> None:
    """As a limit of a file's size, of which the system says likewise that there is no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            ValueError,
            match="data.cache=.*: File too large, while x was prepared: set data.cache or DT",
        ):
            corpus()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert corpus().documents == 1


def test_an_error_of_the_users_files_is_not_the_caches(tmp_path: Path) -> None:
    class Forbidden(Source):
        def describe(self) -> dict[str, Any]:
            return {}

        def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
            raise PermissionError(13, "Permission denied", str(tmp_path / "mine.txt"))
            yield

    with pytest.raises(PermissionError, match="mine.txt"):
        prepare("x", Forbidden(), Bytes(), tmp_path / "cache")


def test_a_cache_says_that_it_is_one(tmp_path: Path, corpus: Callable[[], Corpus]) -> None:
    corpus()
    assert (tmp_path / "cache" / CACHE).is_file()
    assert [file.name for file in find_files(str(tmp_path), "path")] == ["a.txt"]


# Rows and samples


def rows_of(data: Rows) -> Any:
    data.prepare(lambda what, done: None)
    return data.split, data.describe(), dict(data.left_out)


def test_rows_are_kept_and_read_from_there(tmp_path: Path) -> None:
    """As they were, though the files are read once; what was left out is told each time."""
    (tmp_path / "in").mkdir()
    rows = [
        {"text": f"text {i}", "label": i % 3, "more": [1.5, None, True, {"a": "é"}]}
        for i in range(60)
    ]
    file = tmp_path / "in" / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "in" / ".hidden").touch()

    def made(cache: str | None = str(tmp_path / "cache")) -> Rows:
        return Rows("x", Files(str(tmp_path / "in")), Bytes(), cache=cache)

    alone = rows_of(made(None))
    first = made()
    assert (
        rows_of(first) == alone
        and first.cache_folder
        and first.cache_folder.is_dir()
        and alone[2]["hidden files or folders"] == 1
    )
    second = made()
    second.source.rows = None  # type: ignore[method-assign,assignment]
    assert rows_of(second) == alone
    flip(first.cache_folder / "rows.jsonl")
    assert rows_of(made()) == alone
    file.write_text("\n".join(map(json.dumps, rows[:30])))
    assert len([*made_rows(made())]) == 30


def made_rows(data: Rows) -> Iterator[Any]:
    data.prepare(lambda what, done: None)
    return data.all()


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: "a"}, float("nan"), b"bytes", np.float32(1)],
    ids=lambda v: type(v).__name__,
)
def test_rows_that_json_does_not_give_back_are_not_kept(value: Any, tmp_path: Path) -> None:
    class Odd(Source):
        reads = 0

        def describe(self) -> dict[str, Any]:
            return {}

        def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
            self.reads += 1
            for i in range(40):
                yield f"row {i}", {"text": f"{i}", "odd": value}

    data = Rows("x", Odd(), Bytes(), cache=str(tmp_path))
    assert len([*made_rows(data)]) == 40 and data.cache_folder is None and data.source.reads <= 2
    assert all(row["odd"] is value for _, row in data.all())
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_labelled_functions_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Rows("functions", Functions(), Bytes(), group="file", cache=str(tmp_path))
    expected = rows_of(first)
    monkeypatch.setattr(Functions, "rows", None)
    assert (
        rows_of(Rows("functions", Functions(), Bytes(), group="file", cache=str(tmp_path)))
        == expected
    )


def pictures(folder: Path, kinds: tuple[str, ...] = ("dark", "light")) -> Path:
    from PIL import Image

    for value, kind in enumerate(kinds):
        (folder / kind).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (5, 4), (100 * value, number, 0)).save(
                folder / kind / f"{number:02}.png"
            )
    (folder / "dark" / "broken.png").write_bytes(b"no image")
    return folder


def test_images_are_kept_and_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "in")

    def made(cache: str | None, **options: Any) -> tuple[Samples, Any]:
        data = Folder(str(folder), size=4, unreadable="skip", cache=cache, **options)
        data.prepare(lambda what, done: None)
        return data, (data.classes, data.describe(), dict(data.left_out))

    (alone, about), (first, _), (second, again) = (
        made(None),
        made(str(tmp_path / "cache")),
        made(str(tmp_path / "cache")),
    )
    assert (
        about == again
        and second.cache_folder == first.cache_folder is not None
        and about[2] == {"files that are no images": 1}
    )
    for side in ("train", "validation"):
        assert all(
            torch.equal(a, b) for a, b in zip(alone.split[side], second.split[side], strict=True)
        )
    assert made(str(tmp_path / "cache"), grey=True)[0].shape == (1, 4, 4)
    monkeypatch.setattr(Folder, "read", None)
    assert made(str(tmp_path / "cache"))[1] == about
    both = Folder([str(folder / "dark"), str(folder / "light")], size=4, unreadable="skip")
    assert len(both.settings()["files"]) == 41
    with pytest.raises(ValueError, match="data.path is empty"):
        Folder("").settings()
    with pytest.raises(ValueError, match="data.source.name is empty"):
        HubImages(HuggingFace(""))
    with pytest.raises(ValueError, match="data.source=x: set data.source.path for files, or"):
        HubImages("x")  # as it was once written


def test_that_data_are_kept_is_said_only_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cache, said in (
        (None, False),
        (str(tmp_path / "cache"), True),
        (str(tmp_path / "cache"), None),
    ):
        data = Folder(
            str(pictures(tmp_path / "in") if cache is None else tmp_path / "in"),
            4,
            unreadable="skip",
            cache=cache,
        )
        with preparation_progress(data, shown=True) as progress:
            data.prepare(progress)
        printed = capsys.readouterr().out
        if said is None:
            assert printed == ""
        else:
            assert (
                "preparing the data images" in printed
                and (f"are kept in {tmp_path}" in printed) == said
            )


# Images in any number format


class Plain(nn.Module):
    """As its author writes it: no thought of formats."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.conv, self.last, self.outputs = nn.Conv2d(1, 2, 3), nn.Linear(72, outputs), outputs

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(pixels).relu().flatten(1))


class Noise(nn.Linear):
    """A generator that says its inputs."""

    inputs = 3

    def __init__(self) -> None:
        super().__init__(3, 64)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return super().forward(noise).view(-1, 1, 8, 8).tanh()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("task", ["image_classification", "gan"])
def test_images_come_in_the_format_of_the_weights(dtype: torch.dtype, task: str) -> None:
    """A user's own model takes them, in training and in evaluation."""
    data = Digits()
    data.prepare(lambda what, done: None)
    if task == "gan":
        made: Any = GAN(
            {"generator": Noise, "discriminator": lambda: Plain(1)},
            data,
            Sizes(0, 4, None, 1),
            samples=4,
        )
    else:
        made = ImageClassification({"model": Plain}, data, Sizes(0, 4, None, 1))
    models: Models = {name: factory().to(dtype) for name, factory in made.models.items()}
    for update in made.updates:
        loss = update.loss(models, made.batch(0))
        loss.backward()
        assert loss.isfinite() and next(models[update.trains].parameters()).grad.dtype == dtype
    assert all(
        update.measure(models, next(iter(made.validation()))) is not None for update in made.updates
    )
