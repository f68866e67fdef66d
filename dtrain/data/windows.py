"""Windows of a token file, chosen by (seed, step) alone.

Each epoch cuts the tokens into windows of T + 1 from a random offset and reads them in a random
order. Both are drawn from (seed, epoch), so that step k needs no history. In an epoch no token is a
target twice; fewer than 2 T at the ends, which depend on the offset, are no targets. Over the
epochs every token but the first is a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Windows:
    """Rows of T + 1 consecutive tokens: T inputs and, one later, T targets.

    Args:
        tokens: the token ids, one-dimensional; a memory map is read only where needed.
        seq_len: T.
        seed: of offsets and orders.

    Raises:
        ValueError: the tokens do not fill one window.
    """

    def __init__(self, tokens: np.ndarray, *, seq_len: int, seed: int) -> None:
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"{len(tokens)} tokens are fewer than one sequence of seq_len={seq_len} needs "
                f"({seq_len + 1})"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        # One stride of tokens and the rest stay free for the epoch's offset, unless there is only
        # one window.
        self.per_epoch = max(1, (len(tokens) - 1) // seq_len - 1)
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def batch(self, step: int, rows: int) -> Tensor:
        """Return the windows of a step: (rows, T + 1), int64."""
        return self._read([self._start(i) for i in range(step * rows, (step + 1) * rows)])

    def sweep(self, batches: int, rows: int) -> Iterator[Tensor]:
        """Yield at most `batches` x `rows` windows, evenly spaced: each batch (<= rows, T + 1).

        Windows begin at the first token; at the end fewer than T tokens, which fill no window, are
        left out.
        """
        windows = (len(self.tokens) - 1) // self.seq_len
        chosen = np.linspace(0, windows - 1, min(windows, batches * rows)).astype(int)
        for first in range(0, len(chosen), rows):
            yield self._read([int(i) * self.seq_len for i in chosen[first : first + rows]])

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.per_epoch)
        offset, order = self._epoch(epoch)
        return offset + int(order[place]) * self.seq_len

    def _draw(self, epoch: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        spare = len(self.tokens) - 1 - self.per_epoch * self.seq_len
        offset = int(torch.randint(spare + 1, (), generator=generator))
        return offset, torch.randperm(self.per_epoch, generator=generator)

    def _read(self, starts: list[int]) -> Tensor:
        return torch.from_numpy(
            np.stack([self.tokens[s : s + self.seq_len + 1].astype(np.int64) for s in starts])
        )
