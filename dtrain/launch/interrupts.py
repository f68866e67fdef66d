"""Imported first by a script: until all else is imported, which takes seconds, Ctrl-C ends it
without a traceback.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def restore_interrupt() -> None:
    """From now on it is Python's KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
