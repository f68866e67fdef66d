"""Slow a rank on purpose, to see who waits for it.

`HangDetector.stuck_in` is the other fault: a rank that stays away.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtrain.config.schema import Straggler


@contextmanager
def slowed(straggler: Straggler, rank: int) -> Iterator[None]:
    """Take `factor` times as long for what is done within, if this is the rank."""
    start = time.perf_counter()
    yield
    if rank == straggler.rank:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        time.sleep((straggler.factor - 1) * (time.perf_counter() - start))
