"""A rank that is slower than the others, on purpose, to see who waits for it; one that stays
away: `hang_detector`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtrain.config.schema import Straggler


@contextmanager
def slowed(straggler: Straggler, rank: int) -> Iterator[None]:
    """If this is the rank, take `factor` times as long for what is done within."""
    begun = time.perf_counter()
    yield
    if rank == straggler.rank:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        time.sleep((straggler.factor - 1) * (time.perf_counter() - begun))
