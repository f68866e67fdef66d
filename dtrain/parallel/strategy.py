"""The one abstraction: what a strategy may change about training.

A `Plan` folds its strategies over the model, the batch and the sums, in a fixed order; strategies
on different axes therefore compose without knowing each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.optim import Optimizer

from dtrain.parallel.checks.rehearsal import Rehearsal
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.messages import Message
from dtrain.parallel.optimizer import materialize_state
from dtrain.task.batch import Batch, Models, Sums, divide

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan
    from dtrain.task.base import Task, Update

EARLIER = {  # what strategies' and executors' own methods and attributes were called before
    "splits": "divides", "casts": "casts_itself", "cut": "split_into_stages",
    "around": "forward_backward_context", "second_order": "double_backward_context",
    "copies": "duplicated_parameters", "total": "sum_over_axis", "norm": "combine_norm",
    "leaves_out": "skips_nonfinite_steps", "tensors": "state_tensors",
    "restore": "load_state_tensors", "held": "tensors_by_kind",
}  # fmt: skip
REST = -1  # a degree: all the ranks that the other axes leave


class Executor(ABC):
    """How an update's forward and backward are run; and, for an engine, the rest of a step and
    its state.
    """

    # does `step` change nothing where a gradient is not finite, and go on?
    skips_nonfinite_steps = False
    # are they in `.grad` after `train`, and the loop's to exchange and clip?
    leaves_gradients = True

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        _refuse_earlier_names(cls, Executor)

    @abstractmethod
    def train(self, update: Update, batch: Batch, scale: Tensor) -> Tensor:
        """Fill `.grad` from this rank's part of the batch; return its summed loss times
        `scale`, detached.
        """

    @abstractmethod
    def evaluate(self, update: Update, batch: Batch) -> Sums:
        """This rank's sums of every measure of the update (loss, count, ...), without gradients."""

    def norm(self, model: str) -> Tensor | None:
        """The norm of the whole gradient, if an engine clips with its step; None: the loop clips.

        A collective.
        """
        return None

    def step(self, model: str, optimizer: Optimizer) -> None:
        """Update the weights."""
        optimizer.step()

    def make_states(self, model: str, optimizer: Optimizer) -> None:
        """Give every parameter its states, to be filled from a checkpoint, where no step has
        made them.
        """
        if not optimizer.state:
            materialize_state(optimizer)

    def state_tensors(self, model: str) -> dict[str, Tensor] | None:
        """What an engine keeps: weights by their full names, states by `optimizer.<name>.<key>`. A
        collective.

        Whole ones, or distributed; each on one rank at least. None: they are in the model and its
        optimizer.
        """
        return None

    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:  # noqa: B027  # a default, as the others
        """Hand the same tensors, filled from a checkpoint, back to the engine. A collective."""

    def tensors_by_kind(self, model: str) -> dict[str, list[Tensor]] | None:
        """An engine's tensors on this rank: `parameters`, `gradients` and `optimizer`; None: as
        above.
        """
        return None


class Strategy:
    """One way to use the ranks along one axis of the mesh.

    Every method has a default that does nothing, so a strategy states only what it changes. Each
    method that takes a plan is called on every rank alike, in the same order, and may communicate
    over `plan.mesh[self.axis]`.
    """

    name: ClassVar[str] = ""  # what it is called where a run is told
    axis: ClassVar[str]  # the mesh axis it owns
    casts_itself: bool = False  # does it cast weights and inputs to the format of products itself?
    engine: ClassVar[str] = ""  # the library whose engine trains, if one does
    synchronous: bool = True  # is every step's loss that of one process?
    asynchronous: ClassVar[bool] = False  # do its ranks train without meeting in every step?
    # what ranks along `axis` divide of a batch: "rows", "tokens" or ""
    divides: ClassVar[str] = "rows"
    # which parts of a weight does a rank's optimizer step? See `checks/stepping.py`
    stepped: tuple[str, ...] = ()
    # Rules that a plan checks, each by what to use where it is broken; "": there is no such rule.
    stands_alone: ClassVar[str] = ""  # beside no axes {others}, but those of its own engine
    one_model: ClassVar[str] = ""  # a task has one model
    no_followers: ClassVar[str] = ""  # no model of a task follows another

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        _refuse_earlier_names(cls, Strategy)

    def __init__(self, degree: int = REST) -> None:
        self.degree = degree  # ranks along `axis`
        self.offloads = False  # are parameters kept in host memory?
        # are the gradients of weights computed apart from those of inputs?
        self.splits_backward = False

    @property
    def parts(self) -> int:
        """Into how many parts the axis divides the batch; the gradients of the parts are
        averaged.
        """
        return self.degree if self.divides else 1

    def refuse_neighbours(self, plan: Plan) -> None:
        """Raise ValueError if the strategy `stands_alone` and the plan has others."""
        own = {self.engine} - {""}
        others = [s.axis for s in plan.strategies if s is not self and s.engine not in own]
        if self.stands_alone and others:
            rule = self.stands_alone.format(others=", ".join(others))
            raise ValueError(f"strategy {self.name} stands alone{rule}")

    def refuse_models(self, task: Task) -> None:
        """Raise ValueError if the task has more models than the strategy trains, or followers."""
        name = type(task).__name__
        if self.one_model and len(task.models) > 1:
            raise ValueError(
                f"task {name} trains {len(task.models)} models, and strategy {self.name} takes "
                f"one: use {self.one_model}"
            )
        if self.no_followers and task.followers:
            raise ValueError(
                f"task {name} has a model that follows another, and each rank's would follow its "
                f"own: use {self.no_followers}"
            )

    def check(self, plan: Plan) -> None:
        """Raise ValueError, naming the remedy, if this plan cannot work.

        No process group exists yet.
        """

    def check_model(self, model: nn.Module, plan: Plan) -> None:
        """Likewise, if it cannot work with this model, whose parameters may be on the meta
        device.
        """

    def check_task(self, task: Task, plan: Plan) -> None:
        """Likewise, with this task's batches and updates."""

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: Plan
    ) -> Iterator[Rehearsal]:
        """What the ranks along `axis` compute of a whole model, in this process: for the probe."""
        yield from ()

    def micro_batches(self, rows: int, micro_batch_size: int | None) -> int | None:
        """Into how many micro-batches a rank's rows are divided, or None: as `micro_batch_size`
        says.
        """
        return None

    def shard(self, batch: Batch, plan: Plan) -> Batch:
        """This rank's part of the batch."""
        if self.divides != "rows":
            return batch
        return list(divide(batch, self.degree))[plan.mesh[self.axis].get_local_rank()]

    def split_into_stages(self, model: nn.Module, plan: Plan) -> list[nn.Module]:
        """The pieces of the model that this rank holds, in order; their parameters keep their
        full names.
        """
        return [model]

    def parallelize(self, model: nn.Module, plan: Plan) -> nn.Module:
        """The model, or piece of it, that this rank trains: split, sharded or wrapped.

        On the axes `tp`, `ep` and `fsdp` parameters are still on the meta device; on `cp` and `dp`
        they have their values.
        """
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model without this strategy's wrapper: its parameters bear their full names."""
        return model

    def verify(self, model: nn.Module, plan: Plan) -> None:
        """Assert that the model is what was asked for: wrapper, placements, sizes of the local
        shards.
        """

    def optimizer(self, optimizer: Optimizer, model: nn.Module, plan: Plan) -> Optimizer:
        """The optimizer this rank steps."""
        return optimizer

    def executor(
        self, models: Models, optimizers: Mapping[str, Optimizer], plan: Plan, micro_batches: int
    ) -> Executor | None:
        """Another way to run forward and backward than plain gradient accumulation, or None."""
        return None

    def forward_backward_context(self, plan: Plan) -> AbstractContextManager:
        """A context for every forward and backward pass."""
        return nullcontext()

    def double_backward_context(self, model: nn.Module) -> AbstractContextManager:
        """A context for a forward and backward pass whose loss holds gradients of the model."""
        return nullcontext()

    def activation(self, shape: Size) -> Size:
        """The shape of activations between blocks on this rank, where the strategy changes it."""
        return shape

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        """Switch the communication of gradients within backward: off for every micro-batch but
        the last.
        """

    def begin_update(self, model: nn.Module) -> None:
        """Forget which parameters earlier backward passes have reached."""

    def finish_backward(self, model: nn.Module) -> None:
        """After this rank's last backward pass: let those go on that wait for gradients which
        it has not made.
        """

    def unused(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Parameters that this rank's rows have not used, though they have a gradient: zeros,
        that it was given.
        """
        return ()

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        """How often each unit whose messages all ranks must send alike has run in this update,
        by its name.
        """
        return {}

    def reduce_gradients(self, model: nn.Module, plan: Plan) -> None:
        """Finish the gradients after the last backward pass of an update, before they are
        clipped.
        """

    def combine_norm(self, norm: Tensor, plan: Plan) -> Tensor:
        """What is told of the gradient's norm, where ranks along `axis` have gradients of their
        own. A collective.
        """
        return norm

    def duplicated_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters that are copies of another rank's or piece's: their gradients count once."""
        return []

    def after_evaluation(self, model: nn.Module) -> None:
        """Put away what a forward pass without a backward has left behind."""

    def sum_over_axis(self, value: Tensor, plan: Plan) -> Tensor:
        """The sum of `value` over the ranks along `axis` that hold different parts of it, in
        place.
        """
        if self.divides:
            dist.all_reduce(value, group=plan.mesh[self.axis].get_group())
        return value

    def footprint(self, footprint: Footprint, plan: Plan) -> Footprint:
        """What the strategy leaves on the rank at `footprint.place` of what those before it
        have left there.
        """
        return footprint

    def cost(self, footprint: Footprint, plan: Plan) -> list[Message]:
        """What that rank hands to collectives in an optimizer step; the footprint is what all
        strategies left.
        """
        return []


def _refuse_earlier_names(cls: type, base: type) -> None:
    """Raise TypeError for what nobody would call any more: such a class would train something
    else without a word.
    """
    for earlier, now in EARLIER.items():
        if earlier in vars(cls) and hasattr(base, now):
            raise TypeError(f"{cls.__name__}.{earlier}: it is {now} now")


def check_options(axis: str, *options: tuple[str, object, bool, str]) -> None:
    """Refuse what an option cannot be: of (name, value, does it fit, what would) the first that
    does not fit.

    Raises:
        ValueError: names the option, its value and what would fit.
    """
    for name, value, fits, wanted in options:
        if not fits:
            raise ValueError(f"strategy.{axis}.{name}={value} must be {wanted}")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be distributed."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be distributed; a collective if it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> Mapping[str, Tensor]:
    """This rank's part of every gradient of the model, by the parameter's name; a shared one
    once.
    """
    return {name: local_part(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def all_reduce_mean(
    tensors: Iterable[Tensor], group: dist.ProcessGroup, dtype: torch.dtype
) -> None:
    """Replace each tensor by its mean over the group.

    A collective: all ranks have the same shapes, in one order.
    """
    for tensor in tensors:
        all_reduce_sum(tensor, group, dtype)
        tensor.div_(group.size())


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Replace a tensor by its sum over the group, which travels and is summed as `dtype`.

    A collective.
    """
    if tensor.numel():
        travelling = tensor.to(dtype)
        dist.all_reduce(travelling, group=group)
        if travelling is not tensor:
            tensor.copy_(travelling)
