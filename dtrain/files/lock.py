"""A lock, so that only one run uses a folder: it ends with the process that holds it, however
that ends.
"""

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
# said by file systems that have no locks
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
POLL_S = 0.1
RUNS = "hydra.run.dir"


class Lock:
    """Hold a folder until `close`, or this process's end.

    Args:
        folder: that is there.
        patience_s: how long to wait for whoever holds it: another attempt at the same run may be
            about to end.
        key: what the folder is given by.

    Attributes:
        before: what the last holder has left about itself; empty: there was none.

    Raises:
        ValueError: somebody else holds it, or something is in the way.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, patience_s: float = 0.0, key: str = RUNS) -> None:
        check_free(folder, (NAME,), key=key)  # or it would wait for a pipe
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file: TextIO = os.fdopen(file, "r+")
        end = time.monotonic() + patience_s
        while not self._taken():
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

    def _taken(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
        return True

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            found = json_files.parse(self._file.read(1 << 20))
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def leave(self, **about: Any) -> None:
        """Say who holds the folder, for whoever wants it."""
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
    """Refuse what is in the way of a run's own, and links: what was written would go to whatever
    they lead to.

    Args:
        files, folders: of the run, with all that is in them; `linked`: folders that may be links.
        key: what the folder is given by.
    """
    for name in (*files, *folders, *linked):
        kind, right = ("file", Path.is_file) if name in files else ("folder", Path.is_dir)
        every = chain([folder / name], (folder / name).rglob("*")) if name not in linked else ()
        link = next((path for path in every if path.is_symlink()), None)
        if link or (os.path.lexists(folder / name) and not right(folder / name)):
            what = f"{link.relative_to(folder)} is a link" if link else f"{name} is no {kind}"
            raise ValueError(
                f"{key}={folder}: {what}, and the run's own would be in its place: move it away, "
                f"or use another {key}"
            )
