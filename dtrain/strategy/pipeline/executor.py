"""Micro-batches that flow through a pipeline's stages: torch's schedule as an executor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dtrain.model.layout import blocks_of
from dtrain.parallel.footprint import BACKWARD, FORWARD, WEIGHTS
from dtrain.parallel.spans import STAGE, mark
from dtrain.parallel.strategy import Executor, ParallelContext, full_tensor
from dtrain.strategy.pipeline.schedule import Schedule
from dtrain.task.batch import Batch, Sums, divide


class PipelineExecutor(Executor):
    """Run torch's schedule over this rank's stages; updates are `Supervised`.

    Args:
        schedule: which stages the ranks along `pp` hold, and in which order they run.
        stages: this rank's stages, by their index.
        outline: the whole model on the meta device: tells what travels between stages.
        plan, micro_batches: of the run.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: dict[int, nn.Module],
        outline: nn.Module,
        plan: ParallelContext,
        micro_batches: int,
    ) -> None:
        self.schedule, self.stages, self.outline = schedule, stages, outline
        self.plan, self.micro_batches = plan, micro_batches
        self.group = plan.mesh["pp"].get_group()
        self.last = schedule.stages - 1
        self.criterion: Callable[[Tensor, Tensor], Tensor]  # of the step that runs
        self.shapes: dict[str, tuple[int, ...]] = {}  # of each micro-batch
        self.runner: Any = None  # torch's schedule, built with the first batch: it tells the shapes
        self.measured: dict[str, tuple[int, ...]] | None = None  # shapes of an evaluation's sums

    def train(self, update: Any, batch: Batch, scale: Tensor) -> Tensor:
        losses: list[Tensor] = []

        def criterion(outputs: Tensor, index: Tensor) -> Tensor:
            losses.append(full_tensor(update.criterion(outputs, parts[int(index)])) * scale)
            return losses[-1]

        parts = list(divide(batch, self.micro_batches))
        if self.runner is None:
            self.runner, self.shapes = self._build(parts[0], update), _shapes(parts[0])
        if _shapes(parts[0]) != self.shapes:
            raise ValueError(
                f"a pipeline's micro-batches keep their shape: the first had {self.shapes}, one "
                f"now has {_shapes(parts[0])}"
            )
        self.criterion = criterion
        # torch hands each part of the target to the loss: an index, by which the loss finds its
        # micro-batch.
        target = torch.arange(self.micro_batches) if self.last in self.stages else None
        inputs, named = self._arguments(update, batch)
        with self.plan.around(), self.plan.autocast():
            self.runner.step(*inputs, target=target, return_outputs=False, **named)
        return torch.stack(losses).detach().sum() if losses else self._zero()

    def _build(self, part: Batch, update: Any) -> Any:
        """Return torch's schedule: built once, as its first step prepares its messages."""
        hidden, first = self._activation(part, update.inputs), part[update.inputs[0]].to("meta")
        for stage, piece in self.stages.items():
            # what travels has one format, also where autocast made the block's last product
            if stage < self.last:
                piece.register_forward_hook(lambda module, args, output: output.to(hidden.dtype))
                if not any(parameter.requires_grad for parameter in piece.parameters()):
                    piece.register_forward_hook(_end_of_backward)
        stages = [
            MarkedStage(
                piece,
                stage,
                self.schedule.stages,
                self.plan.device,
                hidden if stage else first,
                hidden,
                group=self.group,
            )
            for stage, piece in self.stages.items()
        ]
        options: dict[str, Any] = {"loss_fn": self.loss, "scale_grads": False}
        return self.schedule.build(stages, self.micro_batches, **options)

    def loss(self, outputs: Tensor, index: Tensor) -> Tensor:
        return self.criterion(outputs, index)

    def _activation(self, part: Batch, inputs: tuple[str, ...]) -> Tensor:
        """Return what travels between stages, without its memory: the shape of a block's output."""
        shapes: list[torch.Size] = []
        hook = blocks_of(self.outline)[0].register_forward_hook(
            lambda module, args, output: shapes.append(output.shape)
        )
        with torch.no_grad():
            self.outline(*(part[name].to("meta") for name in inputs))
        hook.remove()
        precision, shape = self.plan.precision, self.plan.activation(shapes[0])
        dtype = precision.compute_dtype if self.plan.casts else precision.weights_dtype
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    def _arguments(self, update: Any, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the first stage's input, and the inputs of every stage, such as positions."""
        first, *others = update.inputs
        names = list(inspect.signature(self.outline.forward).parameters)[1:]
        inputs = (batch[first],) if 0 in self.stages else ()
        return inputs, {name: batch[other] for name, other in zip(names, others, strict=False)}

    def _zero(self, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.zeros(shape, device=self.plan.device, dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self, update: Any, batch: Batch) -> Sums:
        """Run forward passes alone; a rank goes on to its next micro-batch when it has sent one."""
        sums: Sums = {}
        parts = list(divide(batch, self.micro_batches))
        hidden = self._activation(parts[0], update.inputs)
        with self.plan.around(), self.plan.autocast():
            for part in parts:
                for name, value in self._measure(update, part, hidden).items():
                    sums[name] = sums.get(name, 0) + full_tensor(value).double()
        if self.measured is None:  # every rank sums the same, though one alone measures
            shapes = [_shapes(sums)]
            owner = self.schedule.owner(self.last)
            dist.broadcast_object_list(shapes, group=self.group, group_src=owner)
            self.measured = shapes[0]
        return {
            name: sums[name] if name in sums else self._zero(shape)
            for name, shape in self.measured.items()
        }

    def _measure(self, update: Any, part: Batch, hidden: Tensor) -> Sums:
        inputs, named = self._arguments(update, part)
        rank, owner = self.group.rank(), self.schedule.owner
        x = inputs[0] if inputs else None
        for stage, piece in self.stages.items():
            if stage and owner(stage - 1) != rank:
                x = torch.empty_like(hidden, device=self.plan.device)
                dist.recv(x, group=self.group, group_src=owner(stage - 1))
            x = piece(x, **named)
            if stage < self.last and owner(stage + 1) != rank:
                dist.send(x.contiguous(), group=self.group, group_dst=owner(stage + 1))
        return update.measured(x, part) if self.last in self.stages else {}


class MarkedStage(PipelineStage):
    """Mark what torch's stage computes for the timeline, without the waiting around it."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **named: Any) -> Any:
        with mark(STAGE, FORWARD, self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **named: Any) -> Any:
        with mark(STAGE, BACKWARD, self.stage_index, bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **named)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **named: Any) -> Any:
        with mark(STAGE, WEIGHTS, self.stage_index, bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **named)


def _end_of_backward(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """End the gradient that comes to a stage in its output, if nothing trains in it: a hook."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    return output.detach().requires_grad_()


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in batch.items()}
