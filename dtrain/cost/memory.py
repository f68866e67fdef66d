"""The memory of a rank by kind: every storage that a step allocates, when it is born and when it
goes.

    parameters      what the models hold between steps
    gradients       what the optimizer finds
    optimizer       what it keeps
    activations     made by a forward pass, and still there when a backward pass begins
    communication   handed to collectives, and weights that fsdp has gathered
    other           batches, buffers, and what lives for a moment within a pass

A dispatch mode sees each operation's results, on the CPU and on CUDA alike, and a weak reference
tells when the last user of a storage has gone; what an operation takes and frees within itself is
not seen. It costs time: one step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dtrain.cost.predict import bytes_over_time

KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")


@dataclass
class Entry:
    """One storage, from when it is born to when it dies or changes its size.

    Args:
        shape, bytes: of the tensor it was made for; of all of it.
        where: what computed it.
        born, died: in operations.
        kind: what it was said to be for.
        forward, turns: is it of a forward pass; how many times it had gone from forward to
            backward, at both ends.
        travels, received: was it handed to a collective, to be filled by it?
        used: did a backward pass need it?
        feeds: the modules that were given it.
    """

    shape: tuple[int, ...]
    where: Any = None
    born: int = 0
    died: int | None = None
    bytes: int = 0
    kind: str = ""
    forward: bool = False
    turns: tuple[int, int] = (0, 0)
    travels: bool = False
    received: bool = False
    used: bool = False
    feeds: set[str] = field(default_factory=set)

    @property
    def survives(self) -> bool:
        """Was it made in a forward pass, and held for a backward pass?

        What a collective has filled may linger with its message: of that, if the backward pass used
        it.
        """
        held = self.forward and self.died is not None and self.turns[0] < self.turns[1]
        return held and (self.used or not self.received)

    @property
    def what(self) -> str:
        """One of KINDS."""
        return self.kind or (
            "activations" if self.survives else "communication" if self.travels else "other"
        )


class MemoryTracker(TorchDispatchMode):
    """Follows all storages while it is on.

    Args:
        where: says what computes; noted with each storage that is born.
    """

    def __init__(self, where: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.where = where
        self.entries: list[Entry] = []
        # of the kinds that were said, the most bytes at once, padding left out
        self.held: dict[str, int] = {}
        self._now = self._turns = 0
        self._forward = False  # was the last operation one of a forward pass?
        self._living: dict[int, Entry] = {}  # by the address of the storage's object
        self._references: dict[int, Any] = {}

    def hold(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what these tensors are for, whenever they were made: their whole storages,
        padding included.
        """
        held = [_local(tensor) for tensor in tensors if tensor is not None]
        for tensor in held:
            self.entry(tensor).kind = kind
        self.held[kind] = max(self.held.get(kind, 0), sum(tensor.nbytes for tensor in held))

    def entry(self, tensor: Tensor) -> Entry:
        """Of a tensor's storage, which may have been there before."""
        storage = _local(tensor).untyped_storage()
        return self._living.get(storage._cdata) or self._open(storage, Entry(tuple(tensor.shape)))

    def __enter__(self) -> MemoryTracker:
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            self._close(storage._cdata)
            resize(storage, size)
            self._open(storage, Entry((), born=self._now, kind="communication"))

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]  # fsdp's way to free and take
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back with local tensors
        self._now += 1
        forward = (
            torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or _computes_again()
        )
        self._turns += self._forward and not forward
        self._forward = forward
        travels = function.namespace in ("c10d", "_c10d_functional")
        for tensor in _tensors((args, kwargs)):
            entry = self.entry(tensor)
            entry.travels |= travels
            entry.used |= not forward
        if function.namespace == "c10d" and function.overloadpacket.__name__ != "send":
            for tensor in _tensors(args[:1]):
                self.entry(tensor).received = True
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._living:
                shape, turns = tuple(tensor.shape), (self._turns, self._turns)
                made = Entry(
                    shape, self.where(), self._now, forward=forward, turns=turns, travels=travels
                )
                self._open(storage, replace(made, received=travels))
        return output

    def peak(self, kind: str = "") -> int:
        """The most bytes of a kind, or of all, that there were at once."""
        return max(self._curve(kind).values(), default=0)

    def at_peak(self) -> dict[str, int]:
        """Bytes of each kind when there were most of all together."""
        together = self._curve()
        moment = max(together, key=lambda moment: together[moment], default=0)
        found = dict.fromkeys(KINDS, 0)
        for entry in self.entries:
            born, died, size = self._lifetime(entry)
            found[entry.what] += size if born <= moment <= died else 0
        return found

    def _curve(self, kind: str = "") -> dict[int, int]:
        return bytes_over_time(
            self._lifetime(entry) for entry in self.entries if kind in ("", entry.what)
        )

    def _lifetime(self, entry: Entry) -> tuple[int, int, int]:
        return entry.born, self._now if entry.died is None else entry.died, entry.bytes

    def _open(self, storage: torch.UntypedStorage, entry: Entry) -> Entry:
        key = storage._cdata
        entry.bytes = storage.nbytes()
        self.entries.append(entry)
        self._living[key] = entry
        self._references[key] = weakref.ref(storage, lambda _: self._close(key))
        return entry

    def _close(self, key: int) -> None:
        self._references.pop(key, None)
        if entry := self._living.pop(key, None):
            entry.died, entry.turns = self._now, (entry.turns[0], self._turns)


def _computes_again() -> bool:
    """Within backward: is a forward pass run again?

    Then `torch.utils.checkpoint` catches what it saves.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor  # still on its way


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (
        _local(leaf)
        for leaf in tree_iter(tree)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    )
