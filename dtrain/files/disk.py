"""Sync, hash, write and remove files: what a crash, or a loss of power, must not take or change."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of files, to the disk before this
    returns.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(file: Path, text: str) -> None:
    """A text that may hold names of files which are not UTF-8: what cannot be written is
    written out.
    """
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove(place: Path) -> None:
    """Whatever is there, if anything is.

    A link goes, and what it leads to stays: it may be somebody else's.
    """
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
