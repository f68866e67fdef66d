"""The state of a run: its models and optimizers, and the steps and tokens they have seen.

tensors    weights, buffers and optimizer states by full names: a checkpoint's shards
numbers    `next_step` and `tokens`: a checkpoint's manifest
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.parallel.optimizer import OPTIMIZER_STATE, named_tensors, restore_state
from dtrain.parallel.plan import Plan
from dtrain.task.base import Task
from dtrain.task.batch import pieces

Fill = Callable[[list[dict[str, Tensor]]], None]  # reads a checkpoint into the tensors it is given


class TrainingState:
    """The models of one task under one plan, with their optimizers.

    Collective: every rank makes one and calls each method, in the same order.

    Args:
        task, plan: what is trained and how; the plan is connected.
        optimizer: makes an optimizer of a model's parameters.
        micro_batches: in which a rank runs its rows.
        seed: of the weights.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        optimizer: Callable[[nn.Module], Optimizer],
        micro_batches: int,
        seed: int,
    ) -> None:
        plan.check_updates(task)
        plan.check_optimizer(optimizer, micro_batches)
        self.task, self.plan = task, plan
        self.next_step = self.tokens = 0
        self.models = {n: plan.parallelize(factory, seed) for n, factory in task.models.items()}
        # a model that only follows another has no optimizer
        trained = {update.trains for update in task.updates}
        self.optimizers = {
            n: plan.optimizer(optimizer(m), m) for n, m in self.models.items() if n in trained
        }
        self._base_rates = {  # before an engine takes the optimizers over
            n: [group["lr"] for group in o.param_groups] for n, o in self.optimizers.items()
        }
        self._executor = plan.executor(self.models, self.optimizers, micro_batches)

    def state(self) -> dict[str, Tensor]:
        """Return all weights, buffers and optimizer states by full name.

        Names and shapes are the same under every plan.
        """
        return {name: value for piece in self.states() for name, value in piece.items()}

    def states(self) -> list[dict[str, Tensor]]:
        """Return the state of each piece of the models on this rank.

        Two pieces may hold copies of one weight.
        """
        return [
            {_full_name(name, key): value for key, value in tensors.items()}
            for name, model in self.models.items()
            for tensors in self._tensors(name, model, self.optimizers.get(name))
        ]

    def _tensors(
        self, name: str, model: nn.Module, optimizer: Optimizer | None
    ) -> list[dict[str, Tensor]]:
        if (engine := self._executor.state_tensors(name)) is not None:
            return [engine]
        return [named_tensors(self.plan.unwrap(piece), optimizer) for piece in pieces(model)]

    def local_tensors(self, kind: str) -> list[Tensor]:
        """Return this rank's `parameters`, `gradients` or `optimizer` states."""
        tensors: list[Tensor] = []
        for name, model in self.models.items():
            by_parameter = self.optimizers[name].state if name in self.optimizers else {}
            states = (value for state in by_parameter.values() for value in state.values())
            own: dict[str, list[Tensor]] = {
                "parameters": list(model.parameters()),
                "gradients": [p.grad for p in model.parameters() if p.grad is not None],
                "optimizer": [value for value in states if isinstance(value, Tensor)],
            }
            tensors += (self._executor.tensors_by_kind(name) or own)[kind]
        return tensors

    def begin(self, fill: Fill) -> None:
        """Take weights from elsewhere; optimizers begin anew.

        Args:
            fill: fills some of the tensors it is given.
        """
        states = self.states()
        fill(states)
        for piece in states:
            for key, value in piece.items():
                if key.startswith(OPTIMIZER_STATE):
                    value.zero_()  # an engine's
        self._restore(states)

    def load(self, fill: Fill) -> None:
        """Take weights, buffers and optimizer states from a checkpoint.

        Args:
            fill: fills the tensors it is given, and takes away states that the checkpoint's
                optimizer did not have.
        """
        for name, optimizer in self.optimizers.items():
            self._executor.make_states(name, optimizer)
        states = self.states()
        fill(states)
        self._restore(states)

    def _restore(self, states: list[dict[str, Tensor]]) -> None:
        for name, model in self.models.items():
            own = {
                key.replace(f"{name}.", "", 1): value
                for piece in states
                for key, value in piece.items()
                if key.removeprefix(OPTIMIZER_STATE).startswith(f"{name}.")
            }
            self._executor.load_state_tensors(name, own)
            for piece in pieces(model) if name in self.optimizers else ():
                restore_state(self.plan.unwrap(piece), self.optimizers[name], own)


def _full_name(model_name: str, key: str) -> str:
    """Return the name in a checkpoint of the tensor that a model calls `key`."""
    name = key.removeprefix(OPTIMIZER_STATE)
    return f"{OPTIMIZER_STATE if name != key else ''}{model_name}.{name}"
