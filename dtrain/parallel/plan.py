"""A plan: the strategies of one run, in the order in which they act on a model.

    mesh order         pp, dp, fsdp, cp, ep, tp   outermost first: least traffic on slow links
    application order  pp, tp, ep, fsdp, cp, dp   pp cuts into stages, tp and ep split layers, fsdp
                                                  shards; cp and dp add hooks and wrappers

Between `fsdp` and `cp` the parameters get their values; before that the model is on the meta
device and has shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from dtrain.data.seeded import Again
from dtrain.launch.consistency import digest, refuse_other_weights, tensors_of
from dtrain.model.initialize import build, materialize, on_meta
from dtrain.model.layout import (
    ModelFactory,
    attributes_set,
    blocks_of,
    check_layout,
    is_foreign,
    refuse_batch_norm,
    refuse_gradient_hooks,
    refuse_unsaved,
    refuse_written_tensors,
    set_attributes,
)
from dtrain.parallel.accumulate import GradientAccumulation
from dtrain.parallel.checks.optimizer import COLUMNS, ROWS, check_optimizer
from dtrain.parallel.mesh import (
    AFTER_VALUES,
    APPLICATION_ORDER,
    MESH_ORDER,
    fill_degrees,
    rows_of_a_rank,
)
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy
from dtrain.task.base import Task
from dtrain.task.batch import Batch, Models, Stages, pieces


class Plan(ParallelContext):
    """The strategies of a run. Each method asks every strategy in turn. Make one by `Plan.of`.

    Methods without a docstring of their own do what the method of `Strategy` of that name says.
    """

    @classmethod
    def of(cls, strategies: Iterable[Strategy], world_size: int, **settings: object) -> Plan:
        """Make a plan; check its strategies against each other and the world.

        It needs no process group.

        Args:
            settings: fields of `ParallelContext`.

        Raises:
            ValueError: two strategies want one axis, the degrees do not fill the world, or a
                strategy refuses its neighbours.
        """
        plan = cls(in_application_order(strategies, world_size), world_size, **settings)  # type: ignore[arg-type]
        for strategy in plan.strategies:
            strategy.refuse_neighbours(plan)
            strategy.check(plan)
        return plan

    def connect(self) -> Plan:
        """Return the same plan with its device mesh. Collective: every rank calls it once."""
        if not self.degrees:
            return self
        mesh = init_device_mesh(
            self.device.type, tuple(self.degrees.values()), mesh_dim_names=tuple(self.degrees)
        )
        return replace(self, _mesh=mesh)

    @property
    def groups(self) -> dict[str, tuple[str, list[int]]]:
        """Return (axis, ranks) of each process group of this rank with several ranks, by name."""
        groups = [(axis, self.mesh[axis].get_group()) for axis, n in self.degrees.items() if n > 1]
        return {
            str(group.group_name): (axis, dist.get_process_group_ranks(group))
            for axis, group in groups
        }

    def micro_batches(self, global_batch_size: int, micro_batch_size: int | None) -> int:
        """Return into how many micro-batches each rank divides its rows.

        Raises:
            ValueError: the rows do not divide evenly.
        """
        rows = rows_of_a_rank(global_batch_size, self.row_parts, micro_batch_size)
        for strategy in self.strategies:
            if number := strategy.micro_batches(rows, micro_batch_size):
                return number
        return rows // micro_batch_size if micro_batch_size else 1

    @property
    def coordinates(self) -> tuple[int, int]:
        """Return which part of the batch this rank reads, and which stage of the model it holds."""
        part = 0
        for axis in MESH_ORDER:
            if (strategy := self.strategy_on(axis)) and strategy.divides:
                part = part * strategy.degree + self.mesh[axis].get_local_rank()
        return part, self.mesh["pp"].get_local_rank() if self.strategy_on("pp") else 0

    def shard(self, batch: Batch) -> Batch:
        """Return this rank's part of a global batch."""
        for strategy in sorted(self.strategies, key=lambda s: MESH_ORDER.index(s.axis)):
            batch = strategy.shard(batch, self)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def parallelize(self, factory: ModelFactory, seed: int) -> nn.Module:
        """Build the model that this rank trains. Collective."""
        model = build(factory, seed)
        self.check_model(model)
        compared = self.world_size > 1 and is_foreign(model)
        digests = {name: digest(tensor) for name, tensor in (tensors_of(model) if compared else ())}
        name, parts, attributes = type(model).__name__, [model], attributes_set(model)
        for strategy in self.strategies:
            parts = [part for whole in parts for part in strategy.split_into_stages(whole, self)]
        parts = [self._parallelize(part, seed, digests) for part in parts]
        for part in parts:
            set_attributes(self.unwrap(part), attributes)  # parameters have been made anew
        if compared:
            refuse_other_weights(digests, name)
        return Stages(parts) if len(parts) > 1 else parts[0]

    def _parallelize(self, model: nn.Module, seed: int, digests: dict[str, int]) -> nn.Module:
        model = self._apply(("tp", "ep"), model)
        for block in blocks_of(model):
            if self.recompute:
                # a compiled one draws by torch alone
                contexts: Any = {} if self.compile else {"context_fn": _checkpoint_contexts}
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
            if self.compile:
                block.compile()
        model = self._apply(("fsdp",), model)
        note_values = (
            (lambda name, values: digests.update({name: digest(values)}))
            if is_foreign(model)
            else None
        )
        weights = self.precision.weights_dtype
        materialize(model, seed, self.storage, self.device, weights, note_values)
        model = self._apply(AFTER_VALUES, model)
        for strategy in self.strategies:
            strategy.verify(model, self)
        return model

    def check_task(self, task: Task) -> None:
        """Refuse what cannot work with this task; needs no other process."""
        for name, factory in task.models.items():
            model = on_meta(factory)
            model = factory() if model is None else model
            self.check_model(model)
            if name not in task.followers and not any(p.requires_grad for p in model.parameters()):
                raise ValueError(
                    f"nothing of {type(model).__name__} trains: requires_grad is false of all its "
                    "weights"
                )
        self.check_updates(task)

    def check_updates(self, task: Task) -> None:
        """Refuse tasks that do not go with the strategies; the models need not be there yet."""
        for strategy in self.strategies:
            strategy.refuse_models(task)
            strategy.check_task(task, self)

    def check_model(self, model: nn.Module) -> None:
        """Refuse what would train wrong, or not do what was asked."""
        check_layout(model)
        for strategy in self.strategies:
            strategy.check_model(model, self)
        refuse_unsaved(model)
        if self.batch_parts > 1 or self.recompute or self.strategy_on("pp"):
            refuse_batch_norm(model)
        if self.strategies:
            refuse_gradient_hooks(model)
        for strategy in (s for s in self.strategies if {ROWS, COLUMNS} & {*s.stepped}):
            refuse_written_tensors(model, strategy.axis)
        if (self.recompute or self.compile) and not blocks_of(model):
            asked = "activation_checkpointing" if self.recompute else "compile"
            name = type(model).__name__
            raise ValueError(
                f"{asked}=true acts on a model's blocks, and {name} names none in a Layout: use "
                f"{asked}=false, or name them (dtrain/model/layout.py)"
            )

    def check_optimizer(
        self, optimizer: Callable[[nn.Module], Optimizer], micro_batches: int = 1
    ) -> None:
        """Refuse an optimizer that would step parts to other values, or could not be resumed."""
        alone = self.world_size == 1 and not self.strategies and micro_batches == 1
        stepped = {kind: type(s).__name__ for s in self.strategies for kind in s.stepped}
        late = type(self.without_late_states).__name__ if self.without_late_states else ""
        check_optimizer(optimizer, stepped, self.world_size > 1, alone=alone, late=late)

    @property
    def without_late_states(self) -> Strategy | None:
        """Return a strategy that cannot restore states made after the first step, or None."""
        return next((s for s in self.strategies if s.engine or not s.synchronous), None)

    def _apply(self, axes: Sequence[str], model: nn.Module) -> nn.Module:
        for strategy in self.strategies:
            if strategy.axis in axes:
                model = strategy.parallelize(model, self)
        return model

    def optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        for strategy in self.strategies:
            optimizer = strategy.optimizer(optimizer, model, self)
        return optimizer

    def executor(
        self, models: Models, optimizers: Mapping[str, Optimizer], micro_batches: int
    ) -> Executor:
        """Return the first strategy's own executor, or gradient accumulation."""
        if micro_batches > 1:
            for model in models.values():
                refuse_batch_norm(model)
        for strategy in self.strategies:
            if executor := strategy.executor(models, optimizers, self, micro_batches):
                return executor
        return GradientAccumulation(models, micro_batches, self)

    def begin_update(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.begin_update(model)

    def unused(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for strategy in self.strategies for parameter in strategy.unused(model)]

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        return {
            name: calls
            for strategy in self.strategies
            for name, calls in strategy.unit_calls(model).items()
        }

    def reduce_gradients(self, model: nn.Module) -> None:
        """Finish a model's gradients after backward, inner axes first. Collective."""
        for axis in reversed(MESH_ORDER):
            if strategy := self.strategy_on(axis):
                strategy.reduce_gradients(model, self)

    def duplicated_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for strategy in self.strategies for p in strategy.duplicated_parameters(model)]

    def after_evaluation(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                for piece in pieces(model):
                    strategy.after_evaluation(piece)

    def total(self, value: Tensor) -> Tensor:
        """Sum `value` in place over all ranks that hold different parts of it. Collective."""
        for strategy in self.strategies:
            value = strategy.sum_over_axis(value, self)
        return value

    def sum_over_batch_parts(self, value: Tensor) -> Tensor:
        """Sum in place over the ranks that read different parts of the batch. Collective.

        Not over `pp`: each stage of a model has a value of its own. Compare `total`.
        """
        for strategy in (s for s in self.strategies if s.divides):
            value = strategy.sum_over_axis(value, self)
        return value


def in_application_order(strategies: Iterable[Strategy], world_size: int) -> tuple[Strategy, ...]:
    """Return the strategies in application order, and set their degrees.

    Raises:
        ValueError: an unknown axis, two strategies on one, or degrees that do not fill the world.
    """
    by_axis: dict[str, Strategy] = {}
    for strategy in strategies:
        name, axis = type(strategy).__name__, strategy.axis
        if axis not in APPLICATION_ORDER:
            raise ValueError(
                f"strategy {name} is on the axis {axis}: use one of {', '.join(MESH_ORDER)}"
            )
        if axis in by_axis:
            raise ValueError(
                f"{type(by_axis[axis]).__name__} and {name} both want the axis {axis}: choose one "
                "of them"
            )
        by_axis[axis] = strategy
    degrees = fill_degrees(
        {axis: by_axis[axis].degree for axis in MESH_ORDER if axis in by_axis}, world_size
    )
    for axis, degree in degrees.items():
        by_axis[axis].degree = degree
    return tuple(by_axis[axis] for axis in APPLICATION_ORDER if axis in by_axis)


def _checkpoint_contexts() -> tuple[Any, Again]:
    """Return the contexts of a block's first and second forward pass: both draw the same."""
    return nullcontext(), Again()
