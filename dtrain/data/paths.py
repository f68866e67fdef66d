"""Find the files of a path, a folder, a pattern or a list of these; leave out what is no data."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

RUN = (".hydra", "multirun.yaml")  # in the folder of each run, and of each sweep
# a file in the folder of each cache, ours too (https://bford.info/cachedir)
CACHE = "CACHEDIR.TAG"
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n"
LOOP = "links to a folder that they are in"
# Most ways by links to one folder: a few folders whose links cross have more than can be counted.
WAYS = 1000
MARKS = (
    "_SUCCESS", "_metadata", "_common_metadata", "_committed_", "_started_", "Thumbs.db",
    "desktop.ini",
)  # fmt: skip


def expand_path(path: str, key: str) -> Path:
    """Return a user's path, with the home folder in place of `~`.

    Raises:
        ValueError: it is empty, or there is no home folder.
    """
    if not path.strip():
        raise ValueError(
            f"{key} is empty (is a variable not set?): give a path, . is the current folder"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{key}={path}: there is no such home folder: give a whole path") from None


def find_files(path: str | list[str], key: str, left_out: Counter[str] | None = None) -> list[Path]:
    """Return the files of a path, a folder with all that is in it, a pattern, or a list of these.

    Follow links, but not back into folders that they are in. Leave out hidden files, and the
    folders of runs and caches.

    Args:
        key: the setting, for messages.
        left_out: counts what is left out, by kind.

    Raises:
        ValueError: there are no files, a link leads nowhere, or links lead to a folder by too many
            ways.
    """
    paths = [path] if isinstance(path, str) else path
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) for each in paths):
        raise ValueError(f"{key}={path} must be a path, or a list of paths")
    counted = Counter[str]() if left_out is None else left_out
    return list(dict.fromkeys(file for each in paths for file in _files_of(each, key, counted)))


def _files_of(path: str, key: str, left_out: Counter[str]) -> list[Path]:
    start = expand_path(path, key)
    if start.is_dir():
        _refuse_run(start, f"{key}={path}")
        files = sorted(_inside(start, left_out, (), Counter()))
    elif start.is_symlink() or start.exists():
        _refuse_dangling(start)
        if not start.is_file():
            raise ValueError(f"{key}={path} is a pipe or a device, and would be read several times")
        return [start]
    else:
        files = sorted(_matching(start, f"{key}={path}", left_out))
    if not files:
        brackets = ", where [[] stands for [" if "[" in path else ""
        reasons = f" (left out: {left_out_in_words(left_out)})" if left_out else ""
        raise ValueError(
            f"{key}={path}: no such file, and no file in it or matching it{brackets}{reasons}"
        )
    return files


def file_stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of each file: a cheap way to see whether it has changed."""
    return [
        (os.path.abspath(file), (status := file.stat()).st_size, status.st_mtime_ns)
        for file in files
    ]


def left_out_in_words(left_out: Mapping[str, int]) -> str:
    """Say in a line what is left out, by kind."""
    return ", ".join(f"{number:,} {kind}" for kind, number in sorted(left_out.items()) if number)


def _inside(
    folder: Path, left_out: Counter[str], above: tuple[str, ...], ways: Counter[str]
) -> Iterator[Path]:
    """Yield the files of a folder and of the folders in it, but for what `_reason` names."""
    above = (*above, _enter(folder, ways))
    for path in sorted(folder.iterdir()):
        if reason := _reason(path, above):
            left_out[reason] += 1
        elif path.is_dir():
            yield from _inside(path, left_out, above, ways)
        else:
            yield path


def _enter(folder: Path, ways: Counter[str]) -> str:
    """Return the real folder, and count in `ways` how often it was entered.

    Raises:
        ValueError: it was entered more than `WAYS` times: the search might never end.
    """
    real = os.path.realpath(folder)
    ways[real] += 1
    if ways[real] > WAYS:
        raise ValueError(
            f"links lead to {real} by more than {WAYS:,} ways, {folder} for one: leave some of "
            f"them out"
        )
    return real


def _glob(
    folder: Path,
    parts: tuple[str, ...],
    reasons: dict[Path, str],
    above: tuple[str, ...],
    ways: Counter[str],
) -> Iterator[Path]:
    """Yield what the parts of a pattern match in a folder, as `glob` does, without loops of links.

    Args:
        reasons: takes each link by which ** would go back.
        above: the real folders that ** has come through.
    """
    if not parts:
        yield folder
    elif not glob.has_magic(parts[0]):
        if os.path.lexists(folder / parts[0]):
            yield from _glob(folder / parts[0], parts[1:], reasons, (), ways)
    elif folder.is_dir():
        recursive, names = parts[0] == "**", sorted(os.listdir(folder))
        if recursive:
            above = (*above, _enter(folder, ways))
            yield from _glob(folder, parts[1:], reasons, (), ways)
        elif not parts[0].startswith("."):
            names = [name for name in names if not name.startswith(".")]
        for path in (folder / name for name in fnmatch.filter(names, parts[0])):
            if not recursive:
                yield from _glob(path, parts[1:], reasons, (), ways)
            elif path.name.startswith("."):
                continue
            elif not path.is_dir():
                yield from () if parts[1:] else [path]
            elif os.path.realpath(path) in above:
                reasons[path] = LOOP
            else:
                yield from _glob(path, parts, reasons, above, ways)


def _matching(pattern: Path, setting: str, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the files that a pattern matches, but for those in what `_reason` names."""
    parts = pattern.parts
    depth = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    start = Path(*parts[:depth])
    _refuse_run(start, setting)
    reasons: dict[Path, str] = {}  # of each file and folder on the way
    files: list[Path] = []
    folders: set[Path] = set()
    # ** twice in a row means the same as once
    magic = tuple(
        part
        for part, after in zip(parts[depth:], (*parts[depth + 1 :], ""), strict=False)
        if not part == after == "**"
    )
    matches = set(_glob(start, magic, reasons, (), Counter())) if magic else ()
    for path in sorted(matches):
        above = tuple(Path(*path.parts[:i]) for i in range(depth, len(path.parts) + 1))
        for number, part in enumerate(above[1:], start=1):
            if part not in reasons:  # a pattern matches what is hidden only if it says so
                real = tuple(map(os.path.realpath, above[:number]))
                reasons[part] = _reason(part, real, hidden=False)
            if reasons[part]:
                break
        else:
            (folders.add if path.is_dir() else files.append)(path)
    left_out.update(reason for reason in reasons.values() if reason)
    if unread := folders - {parent for file in files for parent in file.parents}:
        left_out["folders that the pattern matches, with what is in them"] += len(unread)
    yield from files


def _reason(path: Path, above: tuple[str, ...], *, hidden: bool = True) -> str:
    """Return why a file or folder is left out; empty: it is not.

    Args:
        above: the real folders that led to it.
        hidden: leave it out if its name begins with a dot.

    Raises:
        ValueError: it is a link that leads nowhere.
    """
    if hidden and path.name.startswith("."):
        return "hidden files or folders"
    _refuse_dangling(path)
    if path.is_dir():
        return LOOP if os.path.realpath(path) in above else _folder_reason(path)
    if not path.is_file():
        return "pipes or devices"
    return "markers of other programs" if path.name.startswith(MARKS) else ""


def _folder_reason(folder: Path) -> str:
    if _is_run(folder):
        return "folders of runs"
    cached = folder.name == "__pycache__" or (folder / CACHE).is_file()
    return "folders of caches" if cached else ""


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN)


def _refuse_run(folder: Path, setting: str) -> None:
    if _is_run(folder):
        raise ValueError(
            f"{setting}: {folder} is the folder of a run, and its files are the run's own: "
            f"use another hydra.run.dir, or a folder for the data"
        )


def _refuse_dangling(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there: mend it")
