"""Pipeline parallel: each rank holds consecutive blocks; micro-batches flow through, gradients flow
back.

    1F1B on two stages, four micro-batches (1' is the backward of 1, . is idle):
    stage 0: embedding, blocks 0-3 |  1  2  .  1' 3  2' 4  3' .  4'
    stage 1: blocks 4-7, head      |  .  1  1' 2  2' 3  3' 4  4' .

With p ranks of v stages and m micro-batches the bubble, the idle share, is (p-1)/(v m + p-1). gpipe
runs all forwards first; 1f1b has its bubble, but keeps p micro-batches' activations instead of m.
zero-bubble schedules (interleaved_zero_bubble, zbv, dualpipev) put the gradients of weights, which
nobody waits for, into it. V schedules (zbv, dualpipev) hold stages r and 2p-1-r on rank r. Beside
fsdp gathered weights stay until a step's last backward. Cost a micro-batch and boundary between
stages: one activation (B, T, C) sent forward, its gradient sent back; a step: the gradient of what
first and last stage share, sent both ways. Memory: 1/p of the weights and their states. Sources:
Narayanan et al. 2020, PipeDream-Flush, 1F1B (2006.09503); Huang et al. 2018, GPipe (1811.06965);
Narayanan et al. 2021, interleaved 1F1B (2104.04473); Lamy-Poirier 2022, looped BFS (2211.05953); Qi
et al. 2023, zero bubble (2401.10241); DeepSeek-AI 2024, DualPipe (2412.19437).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed.pipelining import schedules
from torch.optim import Optimizer

from dtrain.model.layout import Absent, layout_of, shared_names
from dtrain.parallel.checks.optimizer import APART, REGROUPED
from dtrain.parallel.checks.rehearsal import Rehearsal, refuse_foreign, shared_copy
from dtrain.parallel.footprint import Activation, Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy
from dtrain.strategy.pipeline.schedule import passes_of_stages
from dtrain.strategy.pipeline.stages import PipelineExecutor, keep_name, split_evenly, sum_ends
from dtrain.task.batch import Models, pieces

if TYPE_CHECKING:
    from dtrain.task.base import Task

SCHEDULES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "looped_bfs": schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
ONE_STAGE, V = ("gpipe", "1f1b"), ("zbv", "dualpipev")
# micro-batches go round in equal groups of about p
ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")
# input gradients first, those of weights later
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")

BETWEEN = (
    "what stands in `forward` between the modules of its Layout is lost, or done by every stage: "
    "put it into the Layout's first module, blocks or last module, or use a strategy on dp or fsdp"
)
ON_META = (
    "a pipeline learns the shapes of activations there: compute with tensors alone, or use a "
    "strategy on dp or fsdp"
)


class PipelineParallel(Strategy):
    """Cut the model's blocks over `pp`; the first stage has the embedding, the last one the head.

    Args:
        degree: ranks along `pp`; -1: the rest of the world.
        schedule: a name of SCHEDULES.
        micro_batches: into how many a rank's rows are divided; None: as `micro_batch_size` says, or
            else the smallest number of at least two a rank of `pp` that divides the rows, or the
            largest there is.
        stages_per_rank: None: 1 for gpipe and 1f1b, 2 for the others.
        split: blocks of each stage; None: so that the largest stage costs least.
    """

    name = "pipeline"
    axis = "pp"
    stepped = (APART, REGROUPED)
    divides = ""

    def __init__(
        self,
        degree: int = REST,
        *,
        schedule: str = "1f1b",
        micro_batches: int | None = None,
        stages_per_rank: int | None = None,
        split: list[int] | None = None,
    ) -> None:
        super().__init__(degree)
        if schedule not in SCHEDULES:
            raise ValueError(
                f"strategy.pp.schedule={schedule} is unknown: use {', '.join(SCHEDULES)}"
            )
        expected = 1 if schedule in ONE_STAGE else 2
        self.stages_per_rank = expected if stages_per_rank is None else stages_per_rank
        if self.stages_per_rank < 1 or (
            schedule in ONE_STAGE + V and self.stages_per_rank != expected
        ):
            raise ValueError(
                f"strategy.pp.stages_per_rank={stages_per_rank}: schedule {schedule} holds "
                f"{expected}"
                f"{'' if schedule in ONE_STAGE + V else ' or more'} a rank"
            )
        if split is not None and not (
            isinstance(split, list) and all(type(number) is int for number in split)
        ):
            raise ValueError(
                f"strategy.pp.split={split} must be a list of numbers of blocks, such as [5,3]"
            )
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(f"strategy.pp.micro_batches={micro_batches} must be at least 1")
        self.schedule, self.kind = schedule, SCHEDULES[schedule]
        self.asked, self.split = micro_batches, split
        self.splits_backward = schedule in SPLIT_BACKWARD
        self.tied: list[str] = []

    @property
    def stages(self) -> int:
        return self.degree * self.stages_per_rank

    def check(self, plan: ParallelContext) -> None:
        if plan.compile and self.splits_backward:
            raise ValueError(
                f"schedule {self.schedule} divides the backward pass, which compile=true "
                f"makes one: "
                f"use compile=false or interleaved_1f1b"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        name, layout = type(model).__name__, layout_of(model)
        if not (layout.first and layout.blocks and layout.last):
            raise ValueError(
                f"{name} has no pipeline split: its Layout names no first, blocks and last; use a "
                f"strategy on dp or fsdp"
            )
        blocks = len(model.get_submodule(layout.blocks))  # type: ignore[arg-type]
        if self.stages > blocks:
            most = blocks // self.stages_per_rank
            remedy = f"at most pp={most}" if most else "schedule gpipe or 1f1b"
            raise ValueError(
                f"pp={self.degree} x {self.stages_per_rank} stages a rank are {self.stages} "
                f"stages, the "
                f"model has {blocks} blocks: use {remedy}, or more blocks"
            )
        split = self.split or [1] * (self.stages - 1) + [blocks - self.stages + 1]
        if len(split) != self.stages or sum(split) != blocks or min(split) < 1:
            raise ValueError(
                f"strategy.pp.split={self.split} must be {self.stages} numbers of at least 1 "
                f"that sum to "
                f"the model's {blocks} blocks"
            )
        for one, other in shared_names(model).items():
            if not (one.startswith(f"{layout.last}.") and other.startswith(f"{layout.first}.")):
                raise ValueError(
                    f"{name} shares {other} with {one}: only first and last module may share in a "
                    f"pipeline"
                )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if len(task.models) > 1 or not all(hasattr(update, "criterion") for update in task.updates):
            raise ValueError(
                f"task {type(task).__name__} has no pipeline split: that takes one model, and a "
                f"loss of "
                f"its outputs (Supervised); use a strategy on dp or fsdp"
            )

    def micro_batches(self, rows: int, micro_batch_size: int | None) -> int:
        least = {"1f1b": self.degree, "dualpipev": self.stages}.get(self.schedule, 1)
        fitting = [m for m in range(least, rows + 1) if rows % m == 0 and self._in_rounds(m)]
        number = self.asked or (rows // micro_batch_size if micro_batch_size else 0)
        if self.asked and micro_batch_size and rows != self.asked * micro_batch_size:
            raise ValueError(
                f"strategy.pp.micro_batches={self.asked} x micro_batch_size={micro_batch_size} is "
                f"not the "
                f"{rows} rows of a rank: set one of them"
            )
        if not fitting:
            raise ValueError(
                f"schedule {self.schedule} on pp={self.degree} needs at least {least} "
                f"micro-batches, and "
                f"a rank has {rows} rows: use more rows (global_batch_size) or gpipe"
            )
        if number and number not in fitting:
            raise ValueError(
                f"schedule {self.schedule} on pp={self.degree} cannot run {rows} rows in "
                f"{number} micro-"
                f"batches: use strategy.pp.micro_batches={' or '.join(map(str, fitting))}"
            )
        return number or next((m for m in fitting if m >= 2 * self.degree), fitting[-1])

    def _in_rounds(self, micro_batches: int) -> bool:
        return (
            self.schedule not in ROUNDS or micro_batches % max(1, micro_batches // self.degree) == 0
        )

    def owner(self, stage: int) -> int:
        """The rank along `pp` that holds a stage."""
        if self.schedule in V and stage >= self.degree:
            return 2 * self.degree - 1 - stage
        return stage % self.degree

    def held(self, plan: ParallelContext) -> list[int]:
        """The stages of this rank."""
        return self._held_by(plan.mesh[self.axis].get_local_rank())

    def _held_by(self, rank: int) -> list[int]:
        return [stage for stage in range(self.stages) if self.owner(stage) == rank]

    def split_into_stages(self, model: nn.Module, plan: ParallelContext) -> list[nn.Module]:
        counts = self.split or split_evenly(model, self.stages)
        self.tied = list(shared_names(model).values()) if self.stages > 1 else []
        self.last_is_here = self.stages - 1 in self.held(plan)
        self.outline = copy.deepcopy(model).to("meta")  # tells the activations' shape
        return [self._piece(copy.deepcopy(model), stage, counts) for stage in self.held(plan)]

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        counts = self.split or split_evenly(model, self.stages)
        names = list(inspect.signature(model.forward).parameters)[1:]

        pieces = [self._piece(shared_copy(model), stage, counts) for stage in range(self.stages)]

        def staged(x: Tensor, *others: Tensor) -> Tensor:
            for piece in pieces:
                given = x
                with torch.enable_grad():
                    x = piece(x, **dict(zip(names, others, strict=False)))
                refuse_foreign(piece, given, x, model)
            return x

        def outlined(*inputs: Tensor) -> Tensor:
            return torch.zeros(
                copy.deepcopy(model).to("meta")(*(x.to("meta") for x in inputs)).shape
            )

        def shaped(*inputs: Tensor) -> Tensor:
            return torch.zeros(model(*inputs).shape)

        yield Rehearsal(f"in {self.stages} stages", model, staged, BETWEEN)
        yield Rehearsal("on the meta device", shaped, outlined, ON_META)

    def _piece(self, model: nn.Module, stage: int, counts: list[int]) -> nn.Module:
        layout, before = layout_of(model), sum(counts[:stage])
        shared = shared_names(model)
        blocks = model.get_submodule(layout.blocks)
        for index, name in enumerate(dict(blocks.named_children())):
            if not before <= index < before + counts[stage]:
                delattr(blocks, name)  # by name: the others keep theirs
        if stage > 0:
            model.set_submodule(layout.first, Absent())
        if stage < self.stages - 1:
            model.set_submodule(layout.last, Absent())
        elif stage > 0:
            for alias, name in shared.items():
                keep_name(model, alias, name)
        return model

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        (whole,), here = footprint.pieces, footprint.place[self.axis]
        held, counts = self._held_by(here), self.split or split_evenly(whole.outline, self.stages)
        told = passes_of_stages(self, held, here, footprint.micro_batches)
        (output, *_), last = self._outputs(footprint, plan), layout_of(whole.outline).last
        pieces = []
        for stage in held:
            piece = whole.keep(
                self._piece(copy.deepcopy(whole.outline), stage, counts), *told[stage]
            )
            # what a stage gives is kept until its backward: of this one, the logits
            if stage == self.stages - 1:
                end = max((kept.died for kept in piece.kept), default=0)
                shapes = [
                    call.output for call in piece.calls_at((last,)) if call.output and call.graded
                ]
                logits = (
                    Activation(None, x, prod(x) * footprint.activation_bytes, 0, end, frozenset())
                    for x in shapes
                )
                piece = replace(piece, kept=(*piece.kept, *logits))
            elif self.schedule not in ONE_STAGE and self.owner(stage + 1) != here:
                # torch waits for them all at the end
                piece = replace(piece, sent=output * footprint.activation_bytes)
            pieces.append(piece)
        return replace(footprint, pieces=tuple(pieces))

    def _outputs(self, footprint: Footprint, plan: ParallelContext) -> list[int]:
        """Elements of what each call of a block gives, as it travels."""
        calls = footprint.calls_at(lambda layout: (f"{layout.blocks}.*",))
        return [prod(plan.activation(Size(call.output))) for call in calls if call.output]

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        here, last = footprint.place[self.axis], self.stages - 1
        held = self._held_by(here)
        neighbours = [
            s
            for stage in held
            for s in (stage - 1, stage + 1)
            if 0 <= s <= last and self.owner(s) != here
        ]
        tied = (
            set(shared_names(footprint.pieces[0].outline).values())
            if len({0, last} & set(held)) == 1
            else set()
        )
        ends = [prod(w.held) for piece in footprint.pieces for w in piece.weights if w.name in tied]
        # An activation to the next stage, its gradient to the one before.
        sends = self._outputs(footprint, plan)[:1] * len(neighbours)
        return [
            message(self.axis, "send", sends, footprint.activation_bytes, footprint.micro_batches),
            message(self.axis, "send", ends, footprint.weight_bytes),
        ]

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        (model,) = models.values()
        return PipelineExecutor(
            self, self._by_stage(model, plan), self.outline, plan, micro_batches
        )

    def _by_stage(self, model: nn.Module, plan: ParallelContext) -> dict[int, nn.Module]:
        return dict(zip(self.held(plan), pieces(model), strict=True))

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        stages = self._by_stage(model, plan)
        for name in self.tied:
            sum_ends(name, stages, self.stages - 1, self.owner, plan.mesh[self.axis].get_group())

    def duplicated_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        last = pieces(model)[-1]
        return [last.get_parameter(name) for name in self.tied] if self.last_is_here else []

    def sum_over_axis(self, value: Tensor, plan: ParallelContext) -> Tensor:
        """The last stage alone has losses: the others add zero."""
        dist.all_reduce(value, group=plan.mesh[self.axis].get_group())
        return value
