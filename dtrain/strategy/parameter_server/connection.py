"""One worker and one parameter server: messages both ways, over a process group that is theirs
alone.

Each link fails by itself: when a worker dies, its server sees an error on this link and goes on
with all others; when the worker comes back, both make a new one. torch.distributed's messages
between two ranks carry it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEADER = 8  # numbers


class PeerLost(RuntimeError):
    """The other side of a link does not answer any more."""


@contextmanager
def _telling() -> Iterator[None]:
    """What torch says of a connection that is lost, by its own name: other errors are no sign
    of that.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(str(error).splitlines()[0]) from None


class Connection:
    """Making one waits for the other side, which must use the same name.

    Args:
        store: that both reach.
        name: of this link, never used before.
        side: 0 the server, 1 the worker.
        timeout_s: after which silence is an error.

    Raises:
        PeerLost: from any method: the other side is gone.
    """

    def __init__(self, store: dist.Store, name: str, side: int, timeout_s: float) -> None:
        # Bytes of tensors and how many there were; headers do not count.
        self.counts = {"sent": 0, "sent_messages": 0, "received": 0, "received_messages": 0}
        self._other = 1 - side
        with _telling():
            prefixed, timeout = dist.PrefixStore(name, store), timedelta(seconds=timeout_s)
            self._group: Any = dist.ProcessGroupGloo(prefixed, side, 2, timeout)

    def send(self, tensor: Tensor) -> None:
        with _telling():
            self._group.send([tensor], self._other, 0).wait()
        self._count("sent", tensor)

    def receive(self, like: Tensor) -> Tensor:
        """Fill the tensor, which has the shape and the format of what comes, and return it."""
        with _telling():
            self._group.recv([like], self._other, 0).wait()
        self._count("received", like)
        return like

    def say(self, *numbers: float) -> None:
        """A few numbers, exact up to 2^53."""
        header = torch.zeros(HEADER, dtype=torch.float64)
        header[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        with _telling():
            self._group.send([header], self._other, 1).wait()

    def tell(self, flags: list[bool]) -> None:
        """Yes or no, for each of so many things that the other side knows."""
        with _telling():
            self._group.send(
                [torch.tensor([*flags, True], dtype=torch.uint8)], self._other, 1
            ).wait()

    def told(self, number: int) -> list[bool]:
        flags = torch.zeros(number + 1, dtype=torch.uint8)  # one more: a message is not empty
        with _telling():
            self._group.recv([flags], self._other, 1).wait()
        return [bool(flag) for flag in flags[:number].tolist()]

    def hear(self) -> list[float]:
        header = torch.zeros(HEADER, dtype=torch.float64)
        with _telling():
            self._group.recv([header], self._other, 1).wait()
        return header.tolist()

    def _count(self, way: str, tensor: Tensor) -> None:
        self.counts[way] += tensor.numel() * tensor.element_size()
        self.counts[f"{way}_messages"] += 1
