"""What is made of a user's data once, and kept: folders in a cache, each whole or not there.

A folder's name is a fingerprint of all that decides what is in it. It is made under another name,
synced, and renamed when whole, under a lock: what breaks off leaves nothing, and of several ranks
one works. `kept.json` says what was written; what does not agree with it is made anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.data.paths import CACHE, SIGNATURE, expanded
from dtrain.files import json_files
from dtrain.files.disk import digest, sync

MANIFEST = "kept.json"  # by name: the size and the digest of each file
KEY = "data.cache"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached_folder(
    cache: str | Path,
    name: str,
    settings: Callable[[], Mapping[str, Any]],
    make: Callable[[Path], None],
) -> Path:
    """The folder of what `make` writes into the folder that it is given: as it is kept, or made
    now.

    Every process may call it at once. What is there is only read: also where nothing can be
    written.

    Args:
        name: for people.
        settings: tells all that decides what is written, asked for before and after.

    Raises:
        ValueError: the cache cannot be written, its disk is full, or what is read changes
            meanwhile; it is left as it was.
    """
    if "/" in name:
        raise ValueError(f"data.name={name} is a folder's name: it cannot hold a slash")
    asked = settings()
    fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    at = expanded(str(cache), f"{KEY} (DTRAIN_CACHE)")
    folder = at / f"{name}-{fingerprint}"

    def made(partial: Path) -> None:
        make(partial)
        refuse_changed(name, asked, settings)

    try:
        if not is_complete(folder):
            at.mkdir(parents=True, exist_ok=True)
            (at / CACHE).exists() or (at / CACHE).write_text(SIGNATURE)
            with _locked(at / f"{folder.name}.lock"):
                if not is_complete(folder):
                    _make(folder, made)
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(
                f"{KEY}={cache}: {error.strerror}, while {name} was prepared: {_elsewhere()}"
            ) from None
        where = Path(str(error.filename or "?"))
        if not (where.is_relative_to(at) or at.is_relative_to(where)):
            raise  # of the user's files
        raise ValueError(
            f"{KEY}={cache}: {folder.name} is not there, or not whole, and cannot be made "
            f"({error.strerror}: {where}): {_elsewhere()}"
        ) from None
    return folder


def refuse_changed(
    name: str, before: Mapping[str, Any], now: Callable[[], Mapping[str, Any]]
) -> None:
    """Raise ValueError if the files of some data are others than before they were read."""
    if (after := now()) != before:
        changed = sorted(set(_files(before)) ^ set(_files(after)))
        which = f"{changed[0][0]}, of data {name}," if changed else f"what data {name} is read from"
        raise ValueError(f"{which} changed while it was read: start again when it is whole")


def _files(settings: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The stamps among some settings, or among those of their source."""
    return [
        tuple(each)
        for part in (settings, settings.get("source", {}))
        for each in part.get("files", ())
    ]


def is_complete(folder: Path) -> bool:
    """Is it there, as it was written?

    Sizes are compared, and digests of files that are not older than the manifest: whatever changes
    a file makes it so.

    Raises:
        OSError: it may not be read.
    """
    try:
        manifest = folder / MANIFEST
        files, written = json_files.read(manifest), manifest.stat().st_mtime_ns
        for name, (size, sha256) in files.items():
            found = (folder / name).stat()
            if Path(name).name != name or not stat.S_ISREG(found.st_mode):
                return False
            if found.st_size != size or (
                found.st_mtime_ns >= written and digest(folder / name) != sha256
            ):
                return False
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return False
    return bool(files) or [file.name for file in folder.iterdir()] == [MANIFEST]


@contextmanager
def refuse_altered_content(file: Path, *theirs: type[Exception]) -> Iterator[None]:
    """Refuse a kept file whose content is not as ours is: somebody else may have made it, and its
    manifest.

    Args:
        theirs: what else is raised where it is read.
    """
    known = (ValueError, TypeError, KeyError, AttributeError, RecursionError, FileNotFoundError)
    kinds: tuple[type[Exception], ...] = (*known, *theirs)
    try:
        yield
    except kinds as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{file} is not as it was written ({said}): remove {file.parent}"
        ) from None


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        files = {
            file.name: (file.stat().st_size, digest(file)) for file in sorted(partial.iterdir())
        }
        (partial / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
        for name in (*files, MANIFEST, ""):
            sync(partial / name)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among processes; another user's lock serves too.

    Released when the process ends, however it ends.
    """
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not file.exists():
            raise
        lock = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _elsewhere() -> str:
    return f"set {KEY} or DTRAIN_CACHE to a folder of yours with room"
