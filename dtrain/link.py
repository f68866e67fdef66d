"""One worker and one parameter server: messages both ways, over a process group that is theirs alone.

Each link fails by itself: when a worker dies, its server sees an error on this link and goes on with all others; when
the worker comes back, both make a new one. torch.distributed's messages between two ranks carry it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEADER = 8  # numbers


class Link:
    """Making one waits for the other side, which must use the same name.

    Args:
        store: that both reach.
        name: of this link, never used before.
        side: 0 the server, 1 the worker.
        timeout_s: after which silence is an error.

    Raises:
        RuntimeError: from any method: the other side is gone.
    """

    def __init__(self, store: dist.Store, name: str, side: int, timeout_s: float) -> None:
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore(name, store), side, 2, timedelta(seconds=timeout_s))
        self._other = 1 - side
        # Bytes of tensors and how many there were; headers do not count.
        self.counts = {"sent": 0, "sent_messages": 0, "received": 0, "received_messages": 0}

    def send(self, tensor: Tensor) -> None:
        self._group.send([tensor], self._other, 0).wait()
        self._count("sent", tensor)

    def receive(self, like: Tensor) -> Tensor:
        """Fill the tensor, which has the shape and the format of what comes, and return it."""
        self._group.recv([like], self._other, 0).wait()
        self._count("received", like)
        return like

    def _count(self, way: str, tensor: Tensor) -> None:
        self.counts[way] += tensor.numel() * tensor.element_size()
        self.counts[f"{way}_messages"] += 1

    def say(self, *numbers: float) -> None:
        """A few numbers, exact up to 2^53."""
        header = torch.zeros(HEADER, dtype=torch.float64)
        header[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        self._group.send([header], self._other, 1).wait()

    def hear(self) -> list[float]:
        header = torch.zeros(HEADER, dtype=torch.float64)
        self._group.recv([header], self._other, 1).wait()
        return header.tolist()
