"""A connection between one worker and one server: a process group of the two.

Each connection fails by itself. When a worker dies, its server sees an error on this one and goes
on with all others; when the worker comes back, both make a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from dtrain.strategy.parameter_server.protocol import HEADER_BYTES, Header

_TENSOR, _HEADER = 0, 1  # tags of gloo's messages


class PeerLost(RuntimeError):
    """The other side of a connection does not answer any more."""


@contextmanager
def _peer_may_be_lost() -> Iterator[None]:
    """Raise PeerLost for the errors that torch raises of a lost connection, and for no others."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(str(error).splitlines()[0]) from None


class Connection:
    """One end of a connection. Making it waits for the other end, which uses the same name.

    Args:
        store: that both reach.
        name: never used before.
        side: 0 the server, 1 the worker.
        timeout_s: after which silence is an error.

    Raises:
        PeerLost: from every method, when the other side is gone.
    """

    def __init__(self, store: Store, name: str, side: int, timeout_s: float) -> None:
        # bytes and numbers of tensors; headers and flags do not count
        self.counts = {"sent": 0, "sent_messages": 0, "received": 0, "received_messages": 0}
        self._other = 1 - side
        with _peer_may_be_lost():
            prefixed, timeout = PrefixStore(name, store), timedelta(seconds=timeout_s)
            self._group: Any = dist.ProcessGroupGloo(prefixed, side, 2, timeout)

    def send_header(self, header: Header) -> None:
        self._send(torch.frombuffer(bytearray(header.packed()), dtype=torch.uint8), _HEADER)

    def receive_header(self) -> Header:
        """Return the next header. Raise ValueError if it is damaged, or of another version."""
        data = self._receive(torch.zeros(HEADER_BYTES, dtype=torch.uint8), _HEADER)
        return Header.unpacked(data.numpy().tobytes())

    def send_flags(self, flags: list[bool]) -> None:
        # one more than there are: a message is not empty
        self._send(torch.tensor([*flags, True], dtype=torch.uint8), _HEADER)

    def receive_flags(self, number: int) -> list[bool]:
        flags = self._receive(torch.zeros(number + 1, dtype=torch.uint8), _HEADER)
        return [bool(flag) for flag in flags[:number].tolist()]

    def send_tensor(self, tensor: Tensor) -> None:
        self._send(tensor, _TENSOR)
        self._count("sent", tensor)

    def receive_tensor(self, like: Tensor) -> Tensor:
        """Fill `like`, which has the shape and the format of what comes, and return it."""
        self._count("received", self._receive(like, _TENSOR))
        return like

    def _send(self, tensor: Tensor, tag: int) -> None:
        with _peer_may_be_lost():
            self._group.send([tensor], self._other, tag).wait()

    def _receive(self, tensor: Tensor, tag: int) -> Tensor:
        with _peer_may_be_lost():
            self._group.recv([tensor], self._other, tag).wait()
        return tensor

    def _count(self, way: str, tensor: Tensor) -> None:
        self.counts[way] += tensor.numel() * tensor.element_size()
        self.counts[f"{way}_messages"] += 1
