"""Sync, hash, write and remove files: what a crash, or a loss of power, must not take or change."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Write a file, or a folder's list of files, to the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(file: Path, text: str) -> None:
    """Write a text in UTF-8, with escapes for names of files that are not UTF-8."""
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
