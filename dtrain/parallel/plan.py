"""A plan: the strategies of one run, in the order in which they act on a model.

    mesh order         pp, dp, fsdp, cp, ep, tp   outermost first: least traffic on slow links
    application order  pp, tp, ep, fsdp, cp, dp   cut, split, shard; then hook what is left

Between `fsdp` and `cp` the parameters get their values: before, they have shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
from dtrain.parallel.checks.stepping import COLUMNS, ROWS, check_optimizer
from dtrain.parallel.mesh import AFTER_VALUES, MESH_ORDER, in_application_order, rows_of_a_rank
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Executor, Strategy
from dtrain.task.batch import Batch, Models, Stages, pieces

if TYPE_CHECKING:
    from dtrain.task.base import Task


@dataclass(frozen=True)
class Plan:
    """Ordered strategies over one device mesh, with what every strategy needs to know of the run.

    Args:
        strategies: in application order; made by `Plan.of`.
        world_size: ranks of the job.
        precision, device, recompute, compile, clip_norm: as the configuration says.
        mesh: None until `connect`; a plan without strategies needs none.
    """

    strategies: tuple[Strategy, ...]
    world_size: int = 1
    precision: Precision = field(default_factory=Precision)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    recompute: bool = False
    compile: bool = False
    clip_norm: float | None = 1.0
    _mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, strategies: Iterable[Strategy], world_size: int, **settings: object) -> Plan:
        """Check the strategies against each other and the world; no process group is needed.

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
        """The same plan with its device mesh. A collective: every rank calls it, once."""
        if not self.degrees:
            return self
        mesh = init_device_mesh(
            self.device.type, tuple(self.degrees.values()), mesh_dim_names=tuple(self.degrees)
        )
        return replace(self, _mesh=mesh)

    @property
    def mesh(self) -> DeviceMesh:
        assert self._mesh is not None, "the plan is not connected"
        return self._mesh

    @property
    def degrees(self) -> dict[str, int]:
        """Ranks along each axis in use, outermost first."""
        return {axis: s.degree for axis in MESH_ORDER if (s := self.strategy_on(axis))}

    @property
    def storage(self) -> torch.device:
        """Where parameters are kept: host memory if a strategy offloads them."""
        return torch.device("cpu") if any(s.offloads for s in self.strategies) else self.device

    @property
    def groups(self) -> dict[str, tuple[str, list[int]]]:
        """The process groups along axes of several ranks, by name: the axis, and the ranks of
        this rank's group.
        """
        found = {}
        for axis in (axis for axis, degree in self.degrees.items() if degree > 1):
            group = self.mesh[axis].get_group()
            found[str(group.group_name)] = axis, dist.get_process_group_ranks(group)
        return found

    def strategy_on(self, axis: str) -> Strategy | None:
        """The strategy of this axis, if any."""
        return next((s for s in self.strategies if s.axis == axis), None)

    @property
    def batch_parts(self) -> int:
        """Into how many parts a batch is divided; the gradients of the parts are averaged."""
        return prod(s.parts for s in self.strategies)

    @property
    def row_parts(self) -> int:
        """How many ranks, or groups of ranks, read different rows."""
        return prod(s.parts for s in self.strategies if s.divides == "rows")

    def micro_batches(self, global_batch_size: int, micro_batch_size: int | None) -> int:
        """Into how many micro-batches each rank divides its rows.

        Raises:
            ValueError: the rows do not come out even.
        """
        rows = rows_of_a_rank(global_batch_size, self.row_parts, micro_batch_size)
        for strategy in self.strategies:
            if number := strategy.micro_batches(rows, micro_batch_size):
                return number
        return rows // micro_batch_size if micro_batch_size else 1

    @property
    def coordinates(self) -> tuple[int, int]:
        """Which of the batch's parts this rank reads, and which stage of the model it holds."""
        part = 0
        for axis in MESH_ORDER:
            if (strategy := self.strategy_on(axis)) and strategy.divides:
                part = part * strategy.degree + self.mesh[axis].get_local_rank()
        return part, self.mesh["pp"].get_local_rank() if self.strategy_on("pp") else 0

    def shard(self, batch: Batch) -> Batch:
        """This rank's part of a global batch."""
        for strategy in sorted(self.strategies, key=lambda s: MESH_ORDER.index(s.axis)):
            batch = strategy.shard(batch, self)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def parallelize(self, factory: ModelFactory, seed: int) -> nn.Module:
        """Build the model this rank trains. A collective."""
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
                contexts: Any = {} if self.compile else {"context_fn": _twice}
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
            if self.compile:
                block.compile()
        model = self._apply(("fsdp",), model)
        told = (
            None
            if not is_foreign(model)
            else lambda name, values: digests.update({name: digest(values)})
        )
        materialize(model, seed, self.storage, self.device, self.precision.weights_dtype, told)
        model = self._apply(AFTER_VALUES, model)
        for strategy in self.strategies:
            strategy.verify(model, self)
        return model

    def check_task(self, task: Task) -> None:
        """Refuse what cannot work with this task's models, updates and batches; needs no other
        process.
        """
        for name, factory in task.models.items():
            model = on_meta(factory)
            model = factory() if model is None else model
            self.check_model(model)
            if name not in task.followers and not any(p.requires_grad for p in model.parameters()):
                raise ValueError(
                    f"nothing of {type(model).__name__} trains: requires_grad is false of all "
                    f"its weights"
                )
        self.check_updates(task)

    def check_updates(self, task: Task) -> None:
        """The same but for the models, which `parallelize` checks as it builds them."""
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
                f"{asked}=true acts on a model's blocks, and {name} names none in a Layout: "
                f"use {asked}=false, or name them (dtrain/model/layout.py)"
            )

    def check_optimizer(
        self, optimizer: Callable[[nn.Module], Optimizer], micro_batches: int = 1
    ) -> None:
        """Refuse an optimizer that would step parts of weights to other values, or could not be
        resumed.
        """
        alone = self.world_size == 1 and not self.strategies and micro_batches == 1
        stepped = {kind: strategy for strategy in self.strategies for kind in strategy.stepped}
        told = {kind: type(s).__name__ for kind, s in stepped.items()}
        late = type(self.without_late_states).__name__ if self.without_late_states else ""
        check_optimizer(optimizer, told, self.world_size > 1, alone=alone, late=late)

    @property
    def without_late_states(self) -> Strategy | None:
        """The strategy that resumes no state which an optimizer begins to keep after its first
        step; None: there is none.
        """
        return next((s for s in self.strategies if s.engine or not s.synchronous), None)

    def _apply(self, axes: Sequence[str], model: nn.Module) -> nn.Module:
        for strategy in self.strategies:
            if strategy.axis in axes:
                model = strategy.parallelize(model, self)
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model itself, whose parameters bear their full names under every plan."""
        for strategy in self.strategies:
            model = strategy.unwrap(model)
        return model

    def optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        for strategy in self.strategies:
            optimizer = strategy.optimizer(optimizer, model, self)
        return optimizer

    def executor(
        self, models: Models, optimizers: Mapping[str, Optimizer], micro_batches: int
    ) -> Executor:
        """The first strategy's own way to run forward and backward, or gradient accumulation."""
        if micro_batches > 1:
            for model in models.values():
                refuse_batch_norm(model)
        made = (
            strategy.executor(models, optimizers, self, micro_batches)
            for strategy in self.strategies
        )
        return next(filter(None, made), None) or GradientAccumulation(models, micro_batches, self)

    @property
    def casts(self) -> bool:
        """Does a strategy cast weights and inputs itself?

        Then activations between blocks are narrow too.
        """
        return any(strategy.casts_itself for strategy in self.strategies)

    def autocast(self) -> AbstractContextManager:
        """The context of every forward pass."""
        return nullcontext() if self.casts else self.precision.autocast(self.device.type)

    def activation(self, shape: Size) -> Size:
        """The shape of activations between blocks on this rank, told that of whole ones."""
        for strategy in self.strategies:
            shape = strategy.activation(shape)
        return shape

    @contextmanager
    def around(self, twice: Models | None = None) -> Iterator[None]:
        """The strategies' contexts for forward and backward; `twice`: models whose gradients
        are in the loss.
        """
        with ExitStack() as stack:
            for strategy in self.strategies:
                stack.enter_context(strategy.forward_backward_context(self))
                for model in (twice or {}).values():
                    stack.enter_context(strategy.double_backward_context(model))
            yield

    def sync_gradients(self, models: Models, enabled: bool) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.sync_gradients(model, enabled)

    def begin_update(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.begin_update(model)

    def finish_backward(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.finish_backward(model)

    def unused(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for strategy in self.strategies for parameter in strategy.unused(model)]

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        return {
            name: calls
            for strategy in self.strategies
            for name, calls in strategy.unit_calls(model).items()
        }

    def most(self, value: Tensor) -> Tensor:
        """The largest over all ranks that step together, in place. A collective."""
        for strategy in self.strategies:
            if strategy.synchronous and strategy.degree > 1:
                dist.all_reduce(
                    value, dist.ReduceOp.MAX, group=self.mesh[strategy.axis].get_group()
                )
        return value

    def reduce_gradients(self, model: nn.Module) -> None:
        """What is left to do for a model's gradients after backward, inner axes first.

        A collective.
        """
        for axis in reversed(MESH_ORDER):
            if strategy := self.strategy_on(axis):
                strategy.reduce_gradients(model, self)

    def copies(self, model: nn.Module) -> list[nn.Parameter]:
        return [
            parameter
            for strategy in self.strategies
            for parameter in strategy.duplicated_parameters(model)
        ]

    def after_evaluation(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                for piece in pieces(model):
                    strategy.after_evaluation(piece)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks that hold different parts of `value`, in place. A collective."""
        for strategy in self.strategies:
            value = strategy.sum_over_axis(value, self)
        return value

    def sum_over_batch_parts(self, value: Tensor) -> Tensor:
        """The sum over the ranks that read different parts of the batch, in place: of what each
        stage counts.
        """
        for strategy in (s for s in self.strategies if s.divides):
            value = strategy.sum_over_axis(value, self)
        return value


def _twice() -> tuple[Any, Again]:
    """What a block's forward pass runs in, and then its second one, which draws what the first
    has drawn.
    """
    return nullcontext(), Again()
