"""Imported by the server from which ranks are forked, and by nothing else.

What stops a whole process group (`timeout`, systemd, scancel, a terminal that is closed) reaches
the server too. Were it to end, the launcher would take its living ranks for dead. A rank that has
just been forked ends, as by default.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SERVER = os.getpid()


def _end(number: int, frame: FrameType | None) -> None:
    if os.getpid() != SERVER:
        os._exit(128 + number)


for _number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_DFL:
        signal.signal(_number, _end)
