"""One run at a time has a folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

from dtrain import records

NAME = ".lock"
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # said by file systems that have no locks
POLL_S = 0.1


class Lock:
    """Hold a folder until `close`, or this process's end.

    Args:
        folder: that is there.
        patience_s: how long to wait for whoever holds it: another attempt at the same run may be about to end.

    Attributes:
        before: what the last holder has left about itself; empty: there was none.

    Raises:
        ValueError: somebody else holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, patience_s: float = 0.0) -> None:
        self._file: TextIO = os.fdopen(os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        end = time.monotonic() + patience_s
        while not self._taken():
            if time.monotonic() >= end:
                holder = self._read()
                self._file.close()
                who = f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
                raise ValueError(f"hydra.run.dir={folder} is the folder of a run that is going on ({who}): "
                                 f"wait for its end, or use another hydra.run.dir")  # fmt: skip
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
            found = records.parse(self._file.read(1 << 20))
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
