"""A plan: the strategies of one run, in the order in which they act on a model.

    mesh order         pp, dp, fsdp, cp, tp   outermost first: little traffic on slow links, most on fast ones
    application order  pp, tp, fsdp, cp, dp   cut, split, shard; then hook the gradients of what is left

Between `fsdp` and `cp` the parameters get their values: before, they have shapes only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from dtrain.accumulate import Accumulate
from dtrain.batch import Batch, ModelFactory, Models
from dtrain.initialize import build, materialize
from dtrain.layout import blocks_of
from dtrain.precision import Precision
from dtrain.strategy.base import REST, Executor, Strategy, local

MESH_ORDER = ("pp", "dp", "fsdp", "cp", "tp")
BEFORE_VALUES = ("pp", "tp", "fsdp")
AFTER_VALUES = ("cp", "dp")
APPLICATION_ORDER = BEFORE_VALUES + AFTER_VALUES


@dataclass(frozen=True)
class Plan:
    """Ordered strategies over one device mesh, with what every strategy needs to know of the run.

    Args:
        strategies: in application order; made by `Plan.of`.
        world_size: ranks of the job.
        precision, device, recompute, compile: as the configuration says.
        mesh: None until `connect`; a plan without strategies needs none.
    """

    strategies: tuple[Strategy, ...]
    world_size: int = 1
    precision: Precision = field(default_factory=Precision)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    recompute: bool = False
    compile: bool = False
    _mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, strategies: Iterable[Strategy], world_size: int, **settings: object) -> Plan:
        """Check the strategies against each other and the world; no process group is needed.

        Raises:
            ValueError: two strategies want one axis, the degrees do not fill the world, or a strategy
                refuses its neighbours.
        """
        ordered = sorted(strategies, key=lambda s: APPLICATION_ORDER.index(s.axis))
        by_axis = {axis: [s for s in ordered if s.axis == axis] for axis in MESH_ORDER}
        for axis, several in by_axis.items():
            if len(several) > 1:
                names = " and ".join(type(s).__name__ for s in several)
                raise ValueError(f"{names} both want the axis {axis}: choose one of them")
        degrees = fill({axis: s.degree for axis, (s,) in ((a, s) for a, s in by_axis.items() if s)}, world_size)
        for strategy in ordered:
            strategy.degree = degrees[strategy.axis]
        plan = cls(tuple(ordered), world_size, **settings)  # type: ignore[arg-type]
        for strategy in ordered:
            strategy.check(plan)
        return plan

    def connect(self) -> Plan:
        """The same plan with its device mesh. A collective: every rank calls it, once."""
        degrees = self.degrees
        if not degrees:
            return self
        mesh = init_device_mesh(self.device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        return replace(self, _mesh=mesh)

    @property
    def mesh(self) -> DeviceMesh:
        assert self._mesh is not None, "the plan is not connected"
        return self._mesh

    @property
    def degrees(self) -> dict[str, int]:
        """Ranks along each axis in use, outermost first."""
        return {axis: s.degree for axis in MESH_ORDER if (s := self.on(axis))}

    def on(self, axis: str) -> Strategy | None:
        """The strategy of this axis, if any."""
        return next((s for s in self.strategies if s.axis == axis), None)

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided; the gradients of the parts are averaged."""
        return prod(s.parts for s in self.strategies)

    @property
    def row_parts(self) -> int:
        """How many ranks, or groups of ranks, read different rows."""
        return prod(s.parts for s in self.strategies if s.splits == "rows")

    def micro_batches(self, global_batch_size: int, micro_batch_size: int | None) -> int:
        """Into how many micro-batches each rank divides its rows.

        Raises:
            ValueError: the rows do not come out even.
        """
        micro = micro_batch_size or max(1, global_batch_size // self.row_parts)
        unit = self.row_parts * micro
        if global_batch_size % unit:
            near = sorted({max(1, global_batch_size // unit) * unit, -(-global_batch_size // unit) * unit})
            raise ValueError(
                f"global_batch_size={global_batch_size} is not divisible by {self.row_parts} data-parallel ranks "
                f"x micro_batch_size={micro}: use {' or '.join(map(str, near))}"
            )
        return global_batch_size // unit

    def shard(self, batch: Batch) -> Batch:
        """This rank's part of a global batch."""
        for strategy in sorted(self.strategies, key=lambda s: MESH_ORDER.index(s.axis)):
            batch = strategy.shard(batch, self)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def parallelize(self, factory: ModelFactory, seed: int) -> nn.Module:
        """Build the model this rank trains. A collective."""
        model = build(factory, seed)
        self._apply(("pp", "tp"), model)
        for block in blocks_of(model):
            if self.recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if self.compile:
                block.compile()
        model = self._apply(("fsdp",), model)
        materialize(model, seed, self.device, self.precision.weights_dtype)
        model = self._apply(AFTER_VALUES, model)
        for strategy in self.strategies:
            strategy.verify(model, self)
        return model

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

    def executor(self, models: Models, micro_batches: int) -> Executor:
        """The first strategy's own way to run forward and backward, or gradient accumulation."""
        for strategy in self.strategies:
            if executor := strategy.executor(models, self):
                return executor
        return Accumulate(models, micro_batches, self)

    def sync_gradients(self, models: Models, enabled: bool) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.sync_gradients(model, enabled)

    def after_evaluation(self, models: Models) -> None:
        for strategy in self.strategies:
            for model in models.values():
                strategy.after_evaluation(model)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks that hold different parts of `value`, in place. A collective."""
        for strategy in self.strategies:
            value = strategy.total(value, self)
        return value

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale the gradients to at most `max_norm` (None: leave them); return the whole model's norm.

        `torch.nn.utils.clip_grad_norm_` refuses a mix of plain and distributed tensors and gathers the
        norm of each parameter by itself; here one number travels for each way of sharding.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = self._norm(gradients)
        if max_norm is not None:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                part = local(gradient)
                part.mul_(factor.to(part.device))
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        groups: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
        for gradient in gradients:
            groups[_sharded_over(gradient)].append(local(gradient))
        square = torch.zeros((), device=self.device, dtype=torch.float64)
        for axes, parts in sorted(groups.items()):  # a mesh of its own order on each rank would hang
            part = torch.nn.utils.get_total_norm(parts).to(square).square()
            for axis in axes:
                dist.all_reduce(part, group=self.mesh[axis].get_group())
            square += part
        if self.on("pp"):
            dist.all_reduce(square, group=self.mesh["pp"].get_group())
        return square.sqrt()


def _sharded_over(tensor: Tensor) -> tuple[str, ...]:
    """The mesh axes over which a tensor is divided."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    return tuple(name for name, p in zip(names, tensor.placements, strict=True) if not p.is_replicate())


def fill(degrees: dict[str, int], world_size: int) -> dict[str, int]:
    """Replace each -1 by its share of the ranks that the other axes leave; inner axes get the larger shares.

    Raises:
        ValueError: the degrees cannot fill the world exactly.
    """
    for axis, degree in degrees.items():
        if degree != REST and degree < 1:
            raise ValueError(f"strategy.{axis}.degree={degree} must be at least 1, or -1 for the rest of the world")
    asked = " x ".join(f"{axis}={'rest' if d == REST else d}" for axis, d in degrees.items()) or "single"
    fixed = prod(d for d in degrees.values() if d != REST)
    rest, free = world_size // fixed, [axis for axis, d in degrees.items() if d == REST]
    if fixed * rest != world_size or (rest > 1 and not free):
        hint = " (choose a strategy: ddp, fsdp, ...)" if not degrees else ""
        raise ValueError(f"strategy {asked} uses {'a multiple of ' if free else ''}{fixed} "
                         f"{'rank' if fixed == 1 else 'ranks'}, the job has {world_size}{hint}")  # fmt: skip
    filled = dict(degrees)
    for left, axis in zip(range(len(free), 0, -1), reversed(free), strict=True):
        filled[axis] = next(d for d in range(1, rest + 1) if rest % d == 0 and d**left >= rest)
        rest //= filled[axis]
    if len(free) > 1 and any(filled[axis] == 1 for axis in free):
        least = fixed * 2 ** len(free)
        raise ValueError(
            f"strategy {asked} needs at least 2 ranks on each of {' and '.join(free)}: {least} or more in all, the "
            f"job has {world_size}; or set strategy.{free[0]}.degree"
        )
    return filled
