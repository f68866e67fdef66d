"""The instruments around a trainer: what it sends, what it holds, where its time goes.

with Profile(plan) as profile:
    trainer = Trainer(..., profile.phase)
    profile.take()                       messages of the steps since the last call
    with profile.ledger(trainer):        memory by kind, of the steps within
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dtrain.cost import Message
from dtrain.measure.ledger import Ledger
from dtrain.measure.traffic import Traffic
from dtrain.train import FIGURES, OPTIMIZER, Trainer

if TYPE_CHECKING:
    from dtrain.plan import Plan


class Profile:
    """Counts messages from when it is entered until it is left. Every rank of the plan has one."""

    def __init__(self, plan: Plan) -> None:
        axes = [axis for axis, degree in plan.degrees.items() if degree > 1]
        groups = {tuple(dist.get_process_group_ranks(plan.mesh[axis].get_group())): axis for axis in axes}
        self._traffic = Traffic(groups)
        self._held: tuple[Ledger, Trainer] | None = None

    def __enter__(self) -> Profile:
        self._traffic.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._traffic.__exit__(*error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """For the trainer: names what it does. The sums that it needs for its figures are no traffic of the plan's."""
        if name == OPTIMIZER and self._held:
            ledger, trainer = self._held
            ledger.hold("gradients", (parameter.grad for parameter in _parameters(trainer)))
        self._traffic.counting = name != FIGURES
        try:
            with record_function(name):
                yield
        finally:
            self._traffic.counting = False

    def take(self) -> tuple[Message, ...]:
        """What this rank has handed to collectives since the last call."""
        return self._traffic.take()

    @contextmanager
    def ledger(self, trainer: Trainer) -> Iterator[Ledger]:
        """Follow the memory of the steps within."""
        ledger = Ledger()
        ledger.hold("parameters", _parameters(trainer))
        states = (state for optimizer in trainer.optimizers.values() for state in optimizer.state.values())
        ledger.hold("optimizer", (value for state in states for value in state.values() if isinstance(value, Tensor)))
        self._held = ledger, trainer
        try:
            with ledger:
                yield ledger
        finally:
            self._held = None


def _parameters(trainer: Trainer) -> list[Tensor]:
    return [parameter for model in trainer.models.values() for parameter in model.parameters()]
