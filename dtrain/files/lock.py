"""Lock a folder for one run; the lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from dtrain.files import json_files

NAME = ".lock"
# errors of file systems that have no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
POLL_S = 0.1
RUNS = "hydra.run.dir"


class Lock:
    """Hold a folder until `close`, or this process's end.

    Args:
        folder: must exist.
        patience_s: how long to wait for its holder: another attempt at this run may be about to
            end.
        key: the setting that gives the folder.

    Attributes:
        before: what the last holder left about itself (`leave`); empty: there was none.

    Raises:
        ValueError: another process holds it, or something is in the lock's place.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, patience_s: float = 0.0, key: str = RUNS) -> None:
        check_free(folder, (NAME,), key=key)  # or opening it would wait for a pipe
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file: TextIO = os.fdopen(descriptor, "r+")
        end = time.monotonic() + patience_s
        while not self._acquire():
            if time.monotonic() >= end:
                holder = self._read()
                self._file.close()
                who = f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
                raise ValueError(
                    f"{key}={folder} is the folder of a run that is going on ({who}): "
                    f"wait for its end, or use another folder"
                )
            time.sleep(POLL_S)
        self.before = self._read()

    def _acquire(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            holder = json_files.parse(self._file.read(1 << 20))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def leave(self, **about: Any) -> None:
        """Write who holds the folder, for the next one that wants it."""
        self._file.seek(0)
        self._file.truncate()
        json.dump({"host": socket.gethostname(), "process": os.getpid(), **about}, self._file)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def check_free(
    folder: Path,
    files: Collection[str],
    folders: Collection[str] = (),
    linked: Collection[str] = (),
    *,
    key: str = RUNS,
) -> None:
    """Refuse links, and anything else that stands where a run writes.

    What is written through a link would change the file that it leads to.

    Args:
        files: names of the run's files.
        folders: names of its folders, which are searched for links.
        linked: names of its folders that may be links.
        key: the setting that gives the folder.
    """
    for name in (*files, *folders, *linked):
        kind, is_kind = ("file", Path.is_file) if name in files else ("folder", Path.is_dir)
        paths = chain([folder / name], (folder / name).rglob("*")) if name not in linked else ()
        link = next((path for path in paths if path.is_symlink()), None)
        if link or (os.path.lexists(folder / name) and not is_kind(folder / name)):
            problem = f"{link.relative_to(folder)} is a link" if link else f"{name} is no {kind}"
            raise ValueError(
                f"{key}={folder}: {problem}, and the run's own would be in its place: move it "
                f"away, or use another {key}"
            )
