"""Count what this rank really hands to `torch.distributed`, whoever calls it.

Every collective, from DDP's C++ reducer to distributed tensors and DeepSpeed, ends in an operator
of torch's `c10d` library, for which each backend has a kernel. While a `CommunicationCounter` is
open, our kernel runs before the backend's: it notes the operation, the group and the size. Nothing
is left of it once the counter is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import DispatchKey

from dtrain.parallel.messages import Message
from dtrain.parallel.spans import MESSAGE, mark

SELECT = "BackendSelect"  # comes before the kernels of all backends, and after those of autograd
# torch's operation: our word for it, and which argument is the payload (`parallel/messages.py`)
OPERATIONS = {
    "allreduce_": ("all_reduce", 0), "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0), "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "allgather_": ("all_gather", 0), "allgather_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1), "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1), "broadcast_": ("broadcast", 0), "reduce_": ("reduce", 0),
    "gather_": ("gather", 1), "scatter_": ("scatter", 0), "send": ("send", 0),
}  # fmt: skip


class CommunicationCounter:
    """Count calls and payload bytes by axis and operation. A process can have one open at a time.

    Args:
        axes: the name of each group of ranks; messages of other groups count under `other`.
    """

    def __init__(self, axes: Mapping[tuple[int, ...], str]) -> None:
        self.axes, self.counting = axes, False
        self._names: dict[int, str] = {}  # of the groups seen so far, by their hash
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._largest: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> CommunicationCounter:
        self._library = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
        for name, (operation, index) in OPERATIONS.items():
            kernel = self._kernel(name, operation, index)
            self._library.impl(name, kernel, SELECT, with_keyset=True)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        self._library._destroy()  # type: ignore[no-untyped-call]

    def take(self) -> tuple[Message, ...]:
        """Return what was counted since the last call."""
        messages = tuple(
            Message(*key, self._calls[key], self._bytes[key], self._largest[key])
            for key in sorted(self._calls)
        )
        self._calls.clear()
        self._bytes.clear()
        self._largest.clear()
        return messages

    def _kernel(self, name: str, operation: str, index: int) -> Any:
        operator = getattr(torch.ops.c10d, name).default
        where = [argument.name for argument in operator._schema.arguments].index("process_group")

        def kernel(keys: Any, *args: Any, **named: Any) -> Any:
            keys = keys.remove(DispatchKey.BackendSelect)
            if not self.counting:
                return operator.redispatch(keys, *args, **named)
            axis = self._count(operation, args[index], args[where])
            with mark(MESSAGE, operation, axis):
                return operator.redispatch(keys, *args, **named)

        return kernel

    def _count(self, operation: str, payload: Any, group: torch.ScriptObject) -> str:
        axis, size = self._axis(dist.ProcessGroup.unbox(group)), _bytes(payload)
        self._calls[axis, operation] += 1
        self._bytes[axis, operation] += size
        self._largest[axis, operation] = max(size, self._largest[axis, operation])
        return axis

    def _axis(self, group: dist.ProcessGroup) -> str:
        # by its ranks: a distributed tensor may use the group of an equal mesh that was made before
        if hash(group) not in self._names:
            self._names[hash(group)] = self.axes.get(
                tuple(dist.get_process_group_ranks(group)), "other"
            )
        return self._names[hash(group)]


def _bytes(payload: Any) -> int:
    return payload.nbytes if isinstance(payload, Tensor) else sum(map(_bytes, payload))
