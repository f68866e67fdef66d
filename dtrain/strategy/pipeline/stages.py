"""A model cut into stages: how its blocks are divided, what one stage keeps, and how
micro-batches flow through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from dtrain.model.layout import blocks_of, layout_of
from dtrain.parallel.footprint import BACKWARD, FORWARD, WEIGHTS
from dtrain.parallel.spans import STAGE, mark
from dtrain.parallel.strategy import Executor, ParallelContext, full_tensor, local_part
from dtrain.task.batch import Batch, Sums, divide

if TYPE_CHECKING:
    from dtrain.strategy.pipeline.strategy import PipelineParallel


def keep_name(model: nn.Module, alias: str, name: str) -> None:
    """Register the parameter `alias` at `name` too, where the module that had it is gone.

    So a stage's copy of a shared parameter bears the name that it has in the whole model: it starts
    from the same values, and is saved and loaded as the same.
    """
    owner = model
    *path, key = name.split(".")
    for part in path:
        if part not in dict(owner.named_children()):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_parameter(key, model.get_parameter(alias))


def split_evenly(model: nn.Module, stages: int) -> list[int]:
    """How many blocks each stage gets, at least one, so that the costliest stage costs as little as
    can be.

    A module's cost is the size of the matrices that its activations are multiplied by; the first
    stage has the model's first module too, the last one its last.
    """
    layout = layout_of(model)
    costs = [_products(block) for block in blocks_of(model)]
    first, last = (_products(model.get_submodule(path)) for path in (layout.first, layout.last))

    @lru_cache
    def best(start: int, stage: int) -> tuple[int, int, tuple[int, ...]]:
        """(the greatest cost, sum of squares, blocks of each stage) from this block and stage
        on.
        """
        ends = (
            [len(costs)]
            if stage == stages - 1
            else range(start + 1, len(costs) - (stages - stage - 1) + 1)
        )
        found = []
        for end in ends:
            cost = sum(costs[start:end]) + first * (stage == 0) + last * (stage == stages - 1)
            greatest, squares, rest = best(end, stage + 1) if stage < stages - 1 else (0, 0, ())
            found.append((max(cost, greatest), cost**2 + squares, (end - start, *rest)))
        return min(found)

    return list(best(0, 0)[2])


def _products(module: nn.Module) -> int:
    """Multiplications a token: an embedding is looked up, not multiplied."""
    layers = [m for m in module.modules() if not isinstance(m, nn.Embedding)]
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.ndim > 1)


class MarkedStage(PipelineStage):
    """torch's stage; what it computes is marked for the timeline, without the waiting around it."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **named: Any) -> Any:
        with mark(STAGE, FORWARD, self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **named: Any) -> Any:
        with mark(STAGE, BACKWARD, self.stage_index, bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **named)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **named: Any) -> Any:
        with mark(STAGE, WEIGHTS, self.stage_index, bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **named)


class PipelineExecutor(Executor):
    """The executor of a pipeline: torch's schedule over this rank's stages. Its updates are
    `Supervised`.

    Args:
        pipeline: which stages, which schedule.
        stages: this rank's stages, by their index.
        outline: the whole model on the meta device: tells what travels between stages.
        plan, micro_batches: of the run.
    """

    def __init__(
        self,
        pipeline: PipelineParallel,
        stages: dict[int, nn.Module],
        outline: nn.Module,
        plan: ParallelContext,
        micro_batches: int,
    ) -> None:
        self.pipeline, self.stages, self.outline = pipeline, stages, outline
        self.plan, self.micro_batches = plan, micro_batches
        self.group = plan.mesh[pipeline.axis].get_group()
        self.last = pipeline.stages - 1
        self.criterion: Callable[[Tensor, Tensor], Tensor]  # of the step that runs
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.schedule: Any = None  # built with the first batch, which tells the shapes
        # shapes of what an evaluation measures
        self.measured: dict[str, tuple[int, ...]] | None = None

    def train(self, update: Any, batch: Batch, scale: Tensor) -> Tensor:
        losses: list[Tensor] = []

        def criterion(outputs: Tensor, index: Tensor) -> Tensor:
            losses.append(full_tensor(update.criterion(outputs, parts[int(index)])) * scale)
            return losses[-1]

        parts = list(divide(batch, self.micro_batches))
        if self.schedule is None:
            self.schedule, self.shapes = self._build(parts[0], update), _shapes(parts[0])
        if _shapes(parts[0]) != self.shapes:
            raise ValueError(
                f"a pipeline's micro-batches keep their shape: the first had {self.shapes}, one "
                f"now has "
                f"{_shapes(parts[0])}"
            )
        self.criterion = criterion
        # torch hands each part of the target to the loss: an index, by which the loss finds its
        # micro-batch.
        target = torch.arange(self.micro_batches) if self.last in self.stages else None
        inputs, named = self._arguments(update, batch)
        with self.plan.around(), self.plan.autocast():
            self.schedule.step(*inputs, target=target, return_outputs=False, **named)
        return torch.stack(losses).detach().sum() if losses else self._zero()

    @torch.no_grad()
    def evaluate(self, update: Any, batch: Batch) -> Sums:
        """Forward only, stage by stage: each rank goes on to its next micro-batch when it has
        sent this one.
        """
        sums: Sums = {}
        parts = list(divide(batch, self.micro_batches))
        hidden = self._activation(parts[0], update.inputs)
        with self.plan.around(), self.plan.autocast():
            for part in parts:
                for name, value in self._measure(update, part, hidden).items():
                    sums[name] = sums.get(name, 0) + full_tensor(value).double()
        if self.measured is None:  # every rank sums the same, though one alone measures
            told = [_shapes(sums)]
            dist.broadcast_object_list(
                told, group=self.group, group_src=self.pipeline.owner(self.last)
            )
            self.measured = told[0]
        return {
            name: sums[name] if name in sums else self._zero(shape)
            for name, shape in self.measured.items()
        }

    def _measure(self, update: Any, part: Batch, hidden: Tensor) -> Sums:
        inputs, named = self._arguments(update, part)
        x, here = inputs[0] if inputs else None, self.group.rank()
        for stage, piece in self.stages.items():
            if stage and self.pipeline.owner(stage - 1) != here:
                x = torch.empty_like(hidden, device=self.plan.device)
                dist.recv(x, group=self.group, group_src=self.pipeline.owner(stage - 1))
            x = piece(x, **named)
            if stage < self.last and self.pipeline.owner(stage + 1) != here:
                dist.send(
                    x.contiguous(), group=self.group, group_dst=self.pipeline.owner(stage + 1)
                )
        return update.measured(x, part) if self.last in self.stages else {}

    def _zero(self, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.zeros(shape, device=self.plan.device, dtype=torch.float64)

    def _arguments(self, update: Any, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The first input enters at the first stage; every stage knows the others, such as
        positions.
        """
        first, *others = update.inputs
        names = list(inspect.signature(self.outline.forward).parameters)[1:]
        inputs = (batch[first],) if 0 in self.stages else ()
        return inputs, {name: batch[other] for name, other in zip(names, others, strict=False)}

    def _build(self, part: Batch, update: Any) -> Any:
        """The schedule; built once, since it prepares its messages with its first step."""
        hidden, first = self._activation(part, update.inputs), part[update.inputs[0]].to("meta")
        for stage, piece in self.stages.items():
            # what travels has one format, also where autocast made the block's last product
            if stage < self.last:
                piece.register_forward_hook(lambda module, args, output: output.to(hidden.dtype))
                if not any(parameter.requires_grad for parameter in piece.parameters()):
                    piece.register_forward_hook(_end_of_backward)
        made = [
            MarkedStage(
                piece,
                stage,
                self.last + 1,
                self.plan.device,
                hidden if stage else first,
                hidden,
                group=self.group,
            )
            for stage, piece in self.stages.items()
        ]
        kind = self.pipeline.kind
        stages = made[0] if issubclass(kind, PipelineScheduleSingle) else made
        return kind(stages, self.micro_batches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, outputs: Tensor, index: Tensor) -> Tensor:
        return self.criterion(outputs, index)

    def _activation(self, part: Batch, inputs: tuple[str, ...]) -> Tensor:
        """What travels between stages, without its memory: told by the outline's first block."""
        shapes: list[torch.Size] = []
        hook = blocks_of(self.outline)[0].register_forward_hook(
            lambda module, args, output: shapes.append(output.shape)
        )
        with torch.no_grad():
            self.outline(*(part[name].to("meta") for name in inputs))
        hook.remove()
        dtype = (
            self.plan.precision.compute_dtype
            if self.plan.casts
            else self.plan.precision.weights_dtype
        )
        return torch.empty(
            self.plan.activation(shapes[0]), dtype=dtype, device="meta", requires_grad=True
        )


def sum_ends(
    name: str,
    stages: dict[int, nn.Module],
    last: int,
    owner: Callable[[int], int],
    group: dist.ProcessGroup,
) -> None:
    """Give a parameter that first and last stage share the sum of both gradients, on both.

    Their ranks call it.
    """
    ends = [stages[stage].get_parameter(name) for stage in (0, last) if stage in stages]
    gradients = [local_part(end.grad) for end in ends if end.grad is not None]
    if len(gradients) == 2:  # a V schedule: both on this rank
        gradients[0].add_(gradients[1])
        gradients[1].copy_(gradients[0])
    elif gradients:
        peer = owner(0 if last in stages else last)
        theirs = torch.empty_like(gradients[0])
        sending = dist.P2POp(dist.isend, gradients[0], group=group, group_peer=peer)
        receiving = dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()
        gradients[0].add_(theirs)


def _end_of_backward(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A hook on a stage in which nothing trains: the gradient that comes to it ends in its
    output.
    """
    return (
        output
        if output.requires_grad or not torch.is_grad_enabled()
        else output.detach().requires_grad_()
    )


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in batch.items()}
