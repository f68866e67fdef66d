"""What a worker and the servers of its weights say to each other.

    worker                                server
    PULL item                  ->                                asks for work, or for one item
                               <-         WAIT                   not yet: the worker pulls again
                               <-         STOP                   there is no more work
                               <-         WORK item version      then the weights: one tensor
    PUSH item version loss     ->                                then flags (used weights), gradient
    BYE                        ->                                the worker has ended well

The first server hands items out and says STOP; of the others the worker asks for the same item. A
message begins with a `Header`, whose size is fixed; what follows has the size of the weights'
shapes, which both sides know. Keys in a store that all processes reach say who is alive: `Life`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import astuple, dataclass
from enum import IntEnum

VERSION = 1  # of the header's layout
_MAGIC = b"dtps"
_FIELDS = struct.Struct("<4sHHqqdddd")  # magic, version, then the fields of `Header`
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size

OVER = "over"  # the first server sets this key when there is no more work


class Kind(IntEnum):
    """What a message is for; from a worker: PULL, PUSH and BYE."""

    PULL = 1
    PUSH = 2
    BYE = 3
    WAIT = 4
    WORK = 5
    STOP = 6


@dataclass(frozen=True)
class Header:
    """The beginning of a message.

    Args:
        item: of the work queue.
        version: of the server's weights: updates so far.
        loss, norm: of the gradient that follows.
        compute_seconds, wait_seconds: of the worker's process so far.
    """

    kind: Kind
    item: int = 0
    version: int = 0
    loss: float = 0.0
    norm: float = 0.0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0

    def packed(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, VERSION, *astuple(self))
        return fields + _CHECKSUM.pack(zlib.crc32(fields))

    @classmethod
    def unpacked(cls, data: bytes) -> Header:
        """Return the header that `packed` has made bytes of.

        Raises:
            ValueError: the bytes are damaged, or of another version.
        """
        fields, checksum = data[: _FIELDS.size], data[_FIELDS.size :]
        if checksum != _CHECKSUM.pack(zlib.crc32(fields)) or not fields.startswith(_MAGIC):
            raise ValueError(
                f"a header of the parameter server's is damaged: {data.hex()}; start the run again"
            )
        _, version, kind, *numbers = _FIELDS.unpack(fields)
        if version != VERSION:
            raise ValueError(
                f"a header of the parameter server's has version {version}, and this rank reads "
                f"version {VERSION}: install the same dtrain on every machine"
            )
        return cls(Kind(kind), *numbers)


class Life:
    """One process of a worker, and the keys of the store that say whether it is alive.

        begun     the process sets it when it can answer
        welcome   the first server sets it when it has seen `begun`: all servers may connect
        lost      a server sets it when its connection has failed: the worker's rank kills it
        ended     the worker's rank sets it when the process has ended before its work was done
        gone      the worker's rank sets it when it starts no more processes of this worker

    Args:
        worker: from 0.
        number: of processes that this worker had before.
    """

    def __init__(self, worker: int, number: int) -> None:
        self.begun = f"{worker}/{number}"
        self.welcome, self.lost = f"{self.begun}/welcome", f"{self.begun}/lost"
        self.ended, self.gone = f"{self.begun}/ended", f"{worker}/gone"

    def connection(self, server: int) -> str:
        """Return the name of the connection with a server."""
        return f"{self.begun}/{server}"
