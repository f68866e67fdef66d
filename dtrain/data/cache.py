"""A cache of what is made once of a user's data: folders, each whole or not there.

A folder's name is a fingerprint of all that decides its content. It is made under another name,
synced, and renamed when it is whole, under a lock: so an interrupted process leaves nothing, and of
several ranks one works. `kept.json` lists what was written; a folder that differs is made anew.
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

from dtrain.data.paths import CACHE, SIGNATURE, expand_path
from dtrain.files import json_files
from dtrain.files.disk import digest, sync

MANIFEST = "kept.json"  # by name: the size and the digest of each file
KEY = "data.cache"
REMEDY = f"set {KEY} or DTRAIN_CACHE to a folder of yours with room"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached_folder(
    cache: str | Path,
    name: str,
    settings: Callable[[], Mapping[str, Any]],
    make: Callable[[Path], None],
) -> Path:
    """Return the cached folder, or let `make` write it now.

    Many processes may call it at once. A complete folder is only read, so it may be read-only.

    Args:
        name: for people.
        settings: returns all that decides the content; called before and after `make`.
        make: writes the content into the folder that it is given.

    Raises:
        ValueError: the cache cannot be written, its disk is full, or the user's files change
            meanwhile; the cache is left as it was.
    """
    if "/" in name:
        raise ValueError(f"data.name={name} is a folder's name: it cannot hold a slash")
    before = settings()
    fingerprint = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]
    root = expand_path(str(cache), f"{KEY} (DTRAIN_CACHE)")
    folder = root / f"{name}-{fingerprint}"

    def make_unchanged(partial: Path) -> None:
        make(partial)
        refuse_changed(name, before, settings)

    try:
        if not is_complete(folder):
            root.mkdir(parents=True, exist_ok=True)
            if not (root / CACHE).exists():
                (root / CACHE).write_text(SIGNATURE)
            with _locked(root / f"{folder.name}.lock"):
                if not is_complete(folder):
                    _publish(folder, make_unchanged)
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(
                f"{KEY}={cache}: {error.strerror}, while {name} was prepared: {REMEDY}"
            ) from None
        where = Path(str(error.filename or "?"))
        if not (where.is_relative_to(root) or root.is_relative_to(where)):
            raise  # an error with the user's files
        raise ValueError(
            f"{KEY}={cache}: {folder.name} is not there, or not whole, and cannot be made "
            f"({error.strerror}: {where}): {REMEDY}"
        ) from None
    return folder


def refuse_changed(
    name: str, before: Mapping[str, Any], now: Callable[[], Mapping[str, Any]]
) -> None:
    """Raise ValueError if the files of some data have changed since `before`."""
    if (after := now()) != before:
        changed = sorted(set(_files(before)) ^ set(_files(after)))
        which = f"{changed[0][0]}, of data {name}," if changed else f"what data {name} is read from"
        raise ValueError(f"{which} changed while it was read: start again when it is whole")


def _files(settings: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return the stamps of files in some settings and in their source's."""
    return [
        tuple(each)
        for part in (settings, settings.get("source", {}))
        for each in part.get("files", ())
    ]


def is_complete(folder: Path) -> bool:
    """Return whether a folder is there, as it was written.

    Compare sizes, and digests of files that are not older than the manifest: every change makes a
    file newer.

    Raises:
        OSError: the folder may not be read.
    """
    try:
        manifest = folder / MANIFEST
        files, written = json_files.read(manifest), manifest.stat().st_mtime_ns
        for name, (size, sha256) in files.items():
            status = (folder / name).stat()
            if Path(name).name != name or not stat.S_ISREG(status.st_mode):
                return False
            if status.st_size != size or (
                status.st_mtime_ns >= written and digest(folder / name) != sha256
            ):
                return False
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return False
    return bool(files) or [file.name for file in folder.iterdir()] == [MANIFEST]


@contextmanager
def refuse_altered_content(file: Path, *errors: type[Exception]) -> Iterator[None]:
    """Raise ValueError if a cached file cannot be understood: another program may have made it.

    Args:
        errors: that the library raises that reads it, besides Python's own.
    """
    own = (ValueError, TypeError, KeyError, AttributeError, RecursionError, FileNotFoundError)
    kinds: tuple[type[Exception], ...] = (*own, *errors)
    try:
        yield
    except kinds as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{file} is not as it was written ({reason}): remove {file.parent}"
        ) from None


def _publish(folder: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a partial folder, list and sync its files, and rename it to `folder`."""
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
    """Exclude other processes until the block, or this process, ends.

    The file may belong to another user.
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
