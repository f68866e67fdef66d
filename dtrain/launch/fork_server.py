"""Keep the fork server alive when a signal stops its process group. Only the server imports this.

`timeout`, systemd, scancel or a closed terminal stop a whole group. If the server ended too, the
launcher would take living ranks for dead. A rank that was just forked ends, as by default.
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
