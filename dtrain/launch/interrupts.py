"""Let Ctrl-C end a script without a traceback while it imports, which takes seconds.

A script imports this before everything else.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def restore_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
