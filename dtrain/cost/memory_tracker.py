"""Track the memory of a rank by kind: each storage, from its birth to its death.

    parameters      weights, between steps
    gradients       what the optimizer finds before it steps
    optimizer       its states
    activations     made by a forward pass, and still there when a backward pass begins
    communication   handed to collectives, and weights that fsdp has gathered
    other           batches, buffers, and what lives for a moment within a pass

A dispatch mode sees each operation's results, on the CPU and on CUDA alike, and a weak reference
tells when the last user of a storage has gone. It does not see what an operation allocates and
frees within itself. It slows a step down. `predicted_activations.py` predicts the
activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dtrain.cost.predicted_activations import bytes_over_time

KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")


@dataclass
class Storage:
    """One storage, from its birth to its death, or until its size changes.

    Args:
        shape: of the tensor that it was allocated for.
        where: what computed it.
        born: the number of the operation that allocated it.
        died: the number of the last operation before it was freed; None: it is still there.
        bytes: of all of it.
        label: its kind, where `MemoryTracker.label` has named one.
        forward: whether a forward pass allocated it.
        turns: how often the step had gone from forward to backward, at its birth and death.
        travels: whether it was handed to a collective.
        received: whether a collective filled it.
        used: whether a backward pass needed it.
        feeds: the modules that were given it.
    """

    shape: tuple[int, ...]
    where: Any = None
    born: int = 0
    died: int | None = None
    bytes: int = 0
    label: str = ""
    forward: bool = False
    turns: tuple[int, int] = (0, 0)
    travels: bool = False
    received: bool = False
    used: bool = False
    feeds: set[str] = field(default_factory=set)

    @property
    def survives(self) -> bool:
        """Whether a forward pass allocated it and a backward pass found it.

        What a collective filled may linger with its message: it counts if backward used it.
        """
        survives = self.forward and self.died is not None and self.turns[0] < self.turns[1]
        return survives and (self.used or not self.received)

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.label or (
            "activations" if self.survives else "communication" if self.travels else "other"
        )


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track all storages while the mode is on.

    Args:
        where: returns what computes; called for each storage that is born.

    Attributes:
        labelled_bytes: of each labelled kind, the most bytes at once, padding left out.
    """

    def __init__(self, where: Callable[[], Any] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.storages: list[Storage] = []
        self.labelled_bytes: dict[str, int] = {}
        self._now = self._turns = 0
        self._forward = False  # whether the last operation was one of a forward pass
        self._living: dict[int, Storage] = {}  # by the address of the storage's object
        self._references: dict[int, Any] = {}

    def label(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Name the kind of these tensors' whole storages, padding included, however old."""
        local = [_local(tensor) for tensor in tensors if tensor is not None]
        for tensor in local:
            self.storage_of(tensor).label = kind
        size = sum(tensor.nbytes for tensor in local)
        self.labelled_bytes[kind] = max(self.labelled_bytes.get(kind, 0), size)

    def storage_of(self, tensor: Tensor) -> Storage:
        """Return a tensor's storage; it may be older than the mode."""
        raw = _local(tensor).untyped_storage()
        return self._living.get(raw._cdata) or self._open(raw, Storage(tuple(tensor.shape)))

    def __enter__(self) -> Self:
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            self._close(storage._cdata)
            resize(storage, size)
            self._open(storage, Storage((), born=self._now, label="communication"))

        # fsdp frees and allocates so
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
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
            storage = self.storage_of(tensor)
            storage.travels |= travels
            storage.used |= not forward
        if function.namespace == "c10d" and function.overloadpacket.__name__ != "send":
            for tensor in _tensors(args[:1]):
                self.storage_of(tensor).received = True
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            raw = tensor.untyped_storage()
            if raw._cdata not in self._living:
                storage = Storage(tuple(tensor.shape), self.where(), self._now, forward=forward)
                storage.turns = self._turns, self._turns
                storage.travels = storage.received = travels
                self._open(raw, storage)
        return output

    def peak(self, kind: str = "") -> int:
        """Return the most bytes of a kind, or of all kinds together, at any moment."""
        return max(self._curve(kind).values(), default=0)

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each kind at the moment with the most bytes together."""
        together = self._curve()
        moment = max(together, key=lambda moment: together[moment], default=0)
        sizes = dict.fromkeys(KINDS, 0)
        for storage in self.storages:
            born, died, size = self._lifetime(storage)
            sizes[storage.kind] += size if born <= moment <= died else 0
        return sizes

    def _curve(self, kind: str = "") -> dict[int, int]:
        return bytes_over_time(
            self._lifetime(storage) for storage in self.storages if kind in ("", storage.kind)
        )

    def _lifetime(self, storage: Storage) -> tuple[int, int, int]:
        return storage.born, self._now if storage.died is None else storage.died, storage.bytes

    def _open(self, raw: torch.UntypedStorage, storage: Storage) -> Storage:
        key = raw._cdata
        storage.bytes = raw.nbytes()
        self.storages.append(storage)
        self._living[key] = storage
        self._references[key] = weakref.ref(raw, lambda _: self._close(key))
        return storage

    def _close(self, key: int) -> None:
        self._references.pop(key, None)
        if storage := self._living.pop(key, None):
            storage.died, storage.turns = self._now, (storage.turns[0], self._turns)


def _computes_again() -> bool:
    """Return whether backward runs a forward pass again.

    Then `torch.utils.checkpoint` catches what that pass saves.
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
