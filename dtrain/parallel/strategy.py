"""The one abstraction: a strategy overrides the methods for what it changes about training.

A `Plan` folds its strategies over the model, the batch and the sums, in a fixed order. So
strategies on different axes compose without knowing each other; a `ParallelContext` tells them
what they may know of the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from dtrain.config.aliases import refuse_earlier_names
from dtrain.parallel.checks.rehearsal import Rehearsal
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import MESH_ORDER, REST
from dtrain.parallel.messages import Message
from dtrain.parallel.optimizer import materialize_state
from dtrain.parallel.precision import Precision
from dtrain.task.base import Task, Update
from dtrain.task.batch import Batch, Models, Sums, divide

EARLIER = {  # methods and attributes of strategies and executors: earlier names
    "splits": "divides", "casts": "casts_itself", "cut": "split_into_stages",
    "around": "forward_backward_context", "second_order": "double_backward_context",
    "copies": "duplicated_parameters", "total": "sum_over_axis", "norm": "combine_norm",
    "leaves_out": "skips_nonfinite_steps", "tensors": "state_tensors",
    "restore": "load_state_tensors", "held": "tensors_by_kind",
}  # fmt: skip


class Executor(ABC):
    """Run an update's forward and backward; for an engine, also the rest of a step and its state.

    Attributes:
        skips_nonfinite_steps: `step` leaves the weights as they are where a gradient is not finite.
        leaves_gradients: after `train` they are in `.grad`, for the loop to exchange and clip.
    """

    skips_nonfinite_steps = False
    leaves_gradients = True

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        refuse_earlier_names(cls, Executor, EARLIER)

    @abstractmethod
    def train(self, update: Update, batch: Batch, scale: Tensor) -> Tensor:
        """Fill `.grad` from this rank's part of the batch; return loss times `scale`, detached."""

    @abstractmethod
    def evaluate(self, update: Update, batch: Batch) -> Sums:
        """Return this rank's sums of an update's measures (loss, count, ...); no gradients."""

    def norm(self, model: str) -> Tensor | None:
        """Return the whole gradient's norm if an engine clips; None: the loop clips. Collective."""
        return None

    def step(self, model: str, optimizer: Optimizer) -> None:
        """Update the weights."""
        optimizer.step()

    def make_states(self, model: str, optimizer: Optimizer) -> None:
        """Give each parameter its states, for a checkpoint to fill, where no step has made them."""
        if not optimizer.state:
            materialize_state(optimizer)

    def state_tensors(self, model: str) -> dict[str, Tensor] | None:
        """Return what an engine keeps; None: it is in the model and its optimizer. Collective.

        Weights by their full names, states by `optimizer.<name>.<key>`: whole or distributed, each
        on at least one rank.
        """
        return None

    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:  # noqa: B027  # a default, as the others
        """Hand these tensors, filled from a checkpoint, back to the engine. Collective."""

    def tensors_by_kind(self, model: str) -> dict[str, list[Tensor]] | None:
        """Return an engine's local `parameters`, `gradients` and `optimizer`; None: as above."""
        return None


class Strategy:
    """One way to use the ranks along one axis of the mesh.

    Every method has a default that does nothing, so a strategy states only what it changes. Each
    method that takes a plan is called on every rank alike, in the same order, and may communicate
    over `plan.mesh[self.axis]`.

    Attributes:
        name: in reports and messages.
        axis: the mesh axis that it owns.
        casts_itself: it casts weights and inputs to the format of products.
        engine: the library whose engine trains, if one does.
        synchronous: every step's loss is that of one process.
        asynchronous: its ranks do not meet in every step.
        divides: what ranks along `axis` divide of a batch: "rows", "tokens" or "".
        stepped: which parts of weights a rank's optimizer steps; see `checks/optimizer.py`.
        degree: ranks along `axis`.
        offloads: parameters are kept in host memory.
        splits_backward: gradients of weights are computed apart from those of inputs.
    """

    name: ClassVar[str] = ""
    axis: ClassVar[str]
    casts_itself: bool = False
    engine: ClassVar[str] = ""
    synchronous: bool = True
    asynchronous: ClassVar[bool] = False
    divides: ClassVar[str] = "rows"
    stepped: tuple[str, ...] = ()
    # Rules that a plan checks, each by what to use where it is broken; "": there is no such rule.
    stands_alone: ClassVar[str] = ""  # beside no axes {others}, but those of its own engine
    one_model: ClassVar[str] = ""  # a task has one model
    no_followers: ClassVar[str] = ""  # no model of a task follows another

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        refuse_earlier_names(cls, Strategy, EARLIER)

    def __init__(self, degree: int = REST) -> None:
        self.degree = degree
        self.offloads = False
        self.splits_backward = False

    @property
    def parts(self) -> int:
        """Return into how many parts the axis divides the batch; their gradients are averaged."""
        return self.degree if self.divides else 1

    def refuse_neighbours(self, plan: ParallelContext) -> None:
        """Raise ValueError if the strategy `stands_alone` and the plan has others."""
        own = {self.engine} - {""}
        others = [s.axis for s in plan.strategies if s is not self and s.engine not in own]
        if self.stands_alone and others:
            rule = self.stands_alone.format(others=", ".join(others))
            raise ValueError(f"strategy {self.name or type(self).__name__} stands alone{rule}")

    def refuse_models(self, task: Task) -> None:
        """Raise ValueError if the task has more models than the strategy trains, or followers."""
        name, own = type(task).__name__, self.name or type(self).__name__
        if self.one_model and len(task.models) > 1:
            raise ValueError(
                f"task {name} trains {len(task.models)} models, and strategy {own} takes "
                f"one: use {self.one_model}"
            )
        if self.no_followers and task.followers:
            raise ValueError(
                f"task {name} has a model that follows another, and each rank's would follow its "
                f"own: use {self.no_followers}"
            )

    def check(self, plan: ParallelContext) -> None:
        """Raise ValueError, with the remedy, if the plan cannot work; before any process group."""

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        """The same for a model, whose parameters may be on the meta device."""

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        """The same for a task's batches and updates."""

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        """Yield what the ranks along `axis` compute, for the probe to compute in one process."""
        yield from ()

    def micro_batches(self, rows: int, micro_batch_size: int | None) -> int | None:
        """Return how many micro-batches a rank's rows make; None: as `micro_batch_size` says."""
        return None

    def shard(self, batch: Batch, plan: ParallelContext) -> Batch:
        """Return this rank's part of the batch."""
        if self.divides != "rows":
            return batch
        return list(divide(batch, self.degree))[plan.mesh[self.axis].get_local_rank()]

    def split_into_stages(self, model: nn.Module, plan: ParallelContext) -> list[nn.Module]:
        """Return the pieces of the model that this rank holds, in order.

        Their parameters keep their full names.
        """
        return [model]

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        """Return the model, or piece of it, as this rank trains it: split, sharded or wrapped.

        On the axes `tp`, `ep` and `fsdp` parameters are still on the meta device; on `cp` and `dp`
        they have their values.
        """
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model without this strategy's wrapper: parameters bear their full names."""
        return model

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        """Assert that the model has the wrapper, placements and shards that were asked for."""

    def optimizer(self, optimizer: Optimizer, model: nn.Module, plan: ParallelContext) -> Optimizer:
        """Return the optimizer that this rank steps."""
        return optimizer

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor | None:
        """Return another way to run forward and backward; None: gradient accumulation."""
        return None

    def forward_backward_context(self, plan: ParallelContext) -> AbstractContextManager[object]:
        """Return a context for every forward and backward pass."""
        return nullcontext()

    def double_backward_context(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return a context for passes whose loss holds gradients of the model."""
        return nullcontext()

    def activation(self, shape: Size) -> Size:
        """Return the shape of activations between blocks on this rank, given that of whole ones."""
        return shape

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        """Switch the exchange of gradients in backward: on for the last micro-batch alone."""

    def begin_update(self, model: nn.Module) -> None:
        """Forget which parameters earlier backward passes have reached."""

    def finish_backward(self, model: nn.Module) -> None:
        """After the last backward pass, free ranks that wait for gradients not made here."""

    def unused(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return parameters whose gradient is zeros because this rank's rows did not use them."""
        return ()

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        """Return how often each unit that all ranks must run alike ran in this update, by name."""
        return {}

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        """Finish an update's gradients after its last backward pass, before they are clipped."""

    def combine_norm(self, norm: Tensor, plan: ParallelContext) -> Tensor:
        """Return the norm to report where ranks along `axis` differ in gradients. Collective."""
        return norm

    def duplicated_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return parameters that copy another rank's or piece's: their gradients count once."""
        return []

    def after_evaluation(self, model: nn.Module) -> None:
        """Put away what a forward pass without a backward pass left behind."""

    def sum_over_axis(self, value: Tensor, plan: ParallelContext) -> Tensor:
        """Sum `value` in place over the ranks along `axis` that hold different parts of it."""
        if self.divides:
            dist.all_reduce(value, group=plan.mesh[self.axis].get_group())
        return value

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        """Return what the strategy leaves on the rank at `footprint.place`."""
        return footprint

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        """Return what that rank hands to collectives in a step, given what all strategies left."""
        return []


@dataclass(frozen=True)
class ParallelContext:
    """What strategies and executors may know of a run: its ranks, its formats and each other.

    Args:
        strategies: in application order.
        world_size: ranks of the job.
        precision, device, recompute, compile, clip_norm: as the configuration says.
        _mesh: None until `Plan.connect`; a plan without strategies needs none.
    """

    strategies: tuple[Strategy, ...]
    world_size: int = 1
    precision: Precision = field(default_factory=Precision)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    recompute: bool = False
    compile: bool = False
    clip_norm: float | None = 1.0
    _mesh: DeviceMesh | None = None

    @property
    def mesh(self) -> DeviceMesh:
        """Return the device mesh of a plan that is connected."""
        assert self._mesh is not None, "the plan is not connected"
        return self._mesh

    @property
    def degrees(self) -> dict[str, int]:
        """Return the number of ranks along each axis in use, outermost first."""
        return {axis: s.degree for axis in MESH_ORDER if (s := self.strategy_on(axis))}

    @property
    def storage(self) -> torch.device:
        """Return where parameters are kept: in host memory if a strategy offloads them."""
        return torch.device("cpu") if any(s.offloads for s in self.strategies) else self.device

    def strategy_on(self, axis: str) -> Strategy | None:
        """Return the strategy of this axis, if any."""
        return next((s for s in self.strategies if s.axis == axis), None)

    @property
    def batch_parts(self) -> int:
        """Return into how many parts a batch is divided; their gradients are averaged."""
        return prod(s.parts for s in self.strategies)

    @property
    def row_parts(self) -> int:
        """Return how many ranks, or groups of ranks, read different rows."""
        return prod(s.parts for s in self.strategies if s.divides == "rows")

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model without wrappers: parameters bear the same names under every plan."""
        for strategy in self.strategies:
            model = strategy.unwrap(model)
        return model

    @property
    def casts(self) -> bool:
        """Return whether a strategy casts weights and inputs: activations are narrow then, too."""
        return any(strategy.casts_itself for strategy in self.strategies)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of every forward pass."""
        return nullcontext() if self.casts else self.precision.autocast(self.device.type)

    def activation(self, shape: Size) -> Size:
        """Return the shape of activations between blocks on this rank, given that of whole ones."""
        for strategy in self.strategies:
            shape = strategy.activation(shape)
        return shape

    @contextmanager
    def around(self, twice: Models | None = None) -> Iterator[None]:
        """Enter the strategies' contexts for forward and backward.

        Args:
            twice: models whose gradients are in the loss.
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

    def finish_backward(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.finish_backward(model)

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """Replace `value` by the largest over all ranks that step together. Collective."""
        for strategy in self.strategies:
            if strategy.synchronous and strategy.degree > 1:
                dist.all_reduce(
                    value, dist.ReduceOp.MAX, group=self.mesh[strategy.axis].get_group()
                )
        return value


def check_options(axis: str, *options: tuple[str, object, bool, str]) -> None:
    """Refuse the first option that does not fit.

    Args:
        options: name, value, whether it fits, what would fit.

    Raises:
        ValueError: names the option, its value and what would fit.
    """
    for name, value, fits, wanted in options:
        if not fits:
            raise ValueError(f"strategy.{axis}.{name}={value} must be {wanted}")


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be distributed."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be distributed. Collective if it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> Mapping[str, Tensor]:
    """Return this rank's part of the model's gradients by parameter name; a shared one once."""
    return {name: local_part(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def all_reduce_mean(
    tensors: Iterable[Tensor], group: dist.ProcessGroup, dtype: torch.dtype
) -> None:
    """Replace each tensor by its mean over the group.

    Collective: all ranks have the same shapes, in one order.
    """
    for tensor in tensors:
        all_reduce_sum(tensor, group, dtype)
        tensor.div_(group.size())


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Replace a tensor by its sum over the group, sent and summed as `dtype`. Collective."""
    if tensor.numel():
        travelling = tensor.to(dtype)
        dist.all_reduce(travelling, group=group)
        if travelling is not tensor:
            tensor.copy_(travelling)
