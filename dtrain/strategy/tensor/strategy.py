"""Tensor parallel: each rank computes every layer on its slice of heads, hidden units and words.

    Y = f(X A) B,  A = [A1 | A2] cut by columns,  B = [B1 / B2] cut by rows:
    rank 0: f(X A1) B1 \\
    rank 1: f(X A2) B2 /  all-reduce: the sum is Y, the same on both ranks
    sequence parallel: what lies between (norms, residuals) is cut by tokens;
                       all-gather X, reduce-scatter Y

Embedding and head are cut by vocabulary. The loss needs of each token the largest logit, the sum of
exponentials and the target's logit only, so whole logits do not travel, except in evaluation, where
anything may be measured. On GPUs torch can overlap these messages with the products (asynchronous
TP: torch.compile and symmetric memory); on a CPU it cannot.
Cost a block and micro-batch, per rank: 2 all-reduces forward and 2 backward, each 2 (n-1)/n times
the bytes of (B, T, C). With sequence parallelism each becomes an all-gather and a reduce-scatter:
the same bytes, 1/n of the memory between layers, and a step's all-reduce of what is not split, such
as norms. A micro-batch: one more for the embedding, three of (B, T) for the loss.
Memory: 1/n of what is split.
Sources: Shoeybi et al. 2019, Megatron-LM (1909.08053); Korthikanti et al. 2022 (2205.05198).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from torch import Size, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.utils.parametrize import is_parametrized

from dtrain.model.layout import (
    divisors,
    experts_of,
    holders,
    layout_of,
    modules_at,
    multiples,
    shared_names,
)
from dtrain.parallel.checks.optimizer import COLUMNS, REGROUPED, ROWS
from dtrain.parallel.checks.rehearsal import Rehearsal, split_on_ranks
from dtrain.parallel.footprint import Footprint, ModelPart, Shape
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, all_reduce_each, message
from dtrain.parallel.strategy import ParallelContext, Strategy, all_reduce_sum, local_part
from dtrain.strategy.expert import computes_with_local_weights
from dtrain.strategy.tensor.layers import (
    gather_input,
    is_split,
    parameters_on_slices,
    refuse_lost_rows,
    slice_output,
    split_dims,
    split_parameter,
    sum_experts,
    whole_logits,
)
from dtrain.strategy.tensor.traffic import edge_messages, kept_by_rank, logits_shapes
from dtrain.task.batch import pieces

if TYPE_CHECKING:
    from dtrain.task.base import Task


class TensorParallel(Strategy):
    """Split the layers that the model's Layout names `column`, `row` and `vocabulary` over `tp`.

    Args:
        degree: ranks along `tp`; -1: the rest of the world.
        sequence_parallel: cut what lies between those layers by tokens.
        loss_parallel: keep the logits cut by vocabulary; false: gather them.
    """

    name = "tensor"
    axis = "tp"
    stepped = (ROWS, COLUMNS, REGROUPED)
    divides = ""

    def __init__(
        self, degree: int = REST, *, sequence_parallel: bool = False, loss_parallel: bool = True
    ) -> None:
        super().__init__(degree)
        self.sequence_parallel, self.loss_parallel = sequence_parallel, loss_parallel
        # of each model its parameters, and those that act on slices; check_task finds them
        self.on_slices: dict[str, tuple[set[str], set[str]]] = {}

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        name, layout, n = type(model).__name__, layout_of(model), self.degree
        if not layout.column:
            raise ValueError(
                f"{name} names no `column` layers in its Layout: nothing to split over tp; use a "
                f"strategy on dp or fsdp"
            )
        if self.sequence_parallel and not layout.first:
            raise ValueError(
                f"{name} names no `first` module in its Layout: no tokens to cut; use "
                f"sequence_parallel=false"
            )
        for size in layout.sizes:
            if (number := getattr(model, size, None)) and number % n:
                raise ValueError(
                    f"{size}={number} is not divisible by tp={n}: use {divisors(number)}"
                )
        for path, layer in modules_at(model, (*layout.column, *layout.row, *layout.vocabulary)):
            if is_parametrized(layer):
                raise ValueError(
                    f"{path} of {name} computes its weight from others (nn.utils.parametrize), "
                    f"so that no rank can keep a slice of it: use a strategy on dp or fsdp"
                )
        for path, layer in modules_at(model, layout.column):
            if isinstance(layer, nn.Linear) and layer.out_features % n:
                raise ValueError(
                    f"the {layer.out_features} outputs of {name}'s {path} are not divisible by "
                    f"tp={n}: use {divisors(layer.out_features)}"
                )
        refuse_lost_rows(model, n, plan.degrees.get("fsdp", 1))

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if self.loss_parallel and task.mixes_tokens:
            raise ValueError(
                f"the loss of task {type(task).__name__} compares the tokens of a row, and "
                f"takes whole outputs: use strategy.tp.loss_parallel=false"
            )
        self.on_slices |= parameters_on_slices(task)
        if not self.sequence_parallel:
            return
        length = max((t.shape[1] for t in task.batch(0).values() if t.ndim > 1), default=1)
        parts = self.degree * plan.degrees.get("cp", 1)
        if length % parts:
            near = multiples(length, parts)
            raise ValueError(
                f"seq_len={length} is not divisible by {parts} (tp x cp, sequence_parallel): "
                f"use {near}"
            )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        yield split_on_ranks(model, self.degree, self.sequence_parallel)

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        outer: Placement = Shard(1) if self.sequence_parallel else Replicate()
        self._split_layers(model, plan.mesh[self.axis], outer)
        self._join_edges(model, plan.mesh[self.axis], outer)
        return model

    def _split_layers(self, model: nn.Module, mesh: DeviceMesh, outer: Placement) -> None:
        layout, shared = layout_of(model), shared_names(model)
        styles: dict[str, ParallelStyle] = {}
        for path, _ in modules_at(model, layout.column):
            styles[path] = ColwiseParallel()
        for path, _ in modules_at(model, layout.row):
            styles[path] = RowwiseParallel(output_layouts=outer)
        for path, layer in modules_at(model, layout.vocabulary):
            if isinstance(layer, nn.Embedding):
                styles[path] = RowwiseParallel(input_layouts=Replicate())
            elif isinstance(layer, nn.Linear):
                styles[path] = ColwiseParallel(
                    input_layouts=outer,
                    output_layouts=Shard(-1) if self.loss_parallel else Replicate(),
                    use_local_output=not self.loss_parallel,
                )
        for path, style in styles.items():
            parallelize_module(model.get_submodule(path), mesh, style, src_data_rank=None)
        # what was one parameter is one again: whichever of its places was split
        for alias, name in shared.items():
            split = next((n for n in (name, alias) if is_split(model.get_parameter(n))), name)
            for place in (name, alias):
                path, _, key = place.rpartition(".")
                setattr(model.get_submodule(path), key, model.get_parameter(split))
        for _, experts in experts_of(model):
            for name, dim in layout.hidden:
                split_parameter(experts, name, dim, mesh)
            experts.forward = sum_experts(computes_with_local_weights(experts), mesh)

    def _join_edges(self, model: nn.Module, mesh: DeviceMesh, outer: Placement) -> None:
        layout, gather = layout_of(model), gather_input(mesh, outer)
        for path in holders(path for path, _ in modules_at(model, layout.column)):
            model.get_submodule(path).register_forward_pre_hook(gather, with_kwargs=True)
        if self.sequence_parallel:
            gather_local = gather_input(mesh, outer, local=True)
            for _, first_module in modules_at(model, (layout.first,)):
                first_module.register_forward_hook(slice_output(mesh))
            for path in holders(path for path, _ in experts_of(model)):  # routers see whole rows
                router = model.get_submodule(path)
                router.register_forward_pre_hook(gather_local, with_kwargs=True)
                router.register_forward_hook(slice_output(mesh))
        model.register_forward_hook(whole_logits)

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        layout = layout_of(model)
        for path, layer in modules_at(model, layout.column + layout.row):
            assert is_split(layer.weight), f"{path} is not split over {self.axis}"

    @contextmanager
    def forward_backward_context(self, plan: ParallelContext) -> Iterator[None]:
        with loss_parallel() if self.loss_parallel else nullcontext(), implicit_replication():
            yield

    def activation(self, shape: Size) -> Size:
        rows, tokens, *others = shape
        return Size((rows, tokens // self.degree if self.sequence_parallel else tokens, *others))

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        group, dtype = plan.mesh[self.axis].get_group(), plan.precision.reduce_dtype
        for piece in pieces(model):
            for parameter in piece.parameters():
                # an embedding has a whole gradient: keep this rank's rows of it
                if isinstance(parameter.grad, DTensor):
                    assert isinstance(parameter, DTensor)
                    parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
            for _, parameter in self._with_partial_gradients(piece):
                if parameter.grad is not None and not is_split(parameter):
                    all_reduce_sum(local_part(parameter.grad), group, dtype)

    def _with_partial_gradients(self, piece: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters of whose gradient each rank has a part: of some tokens, or features."""
        whole, on_slices = self._meet_all_tokens(piece), self._on_slices(piece)
        for name, parameter in piece.named_parameters():
            if name in on_slices or (self.sequence_parallel and id(parameter) not in whole):
                yield name, parameter

    def _meet_all_tokens(self, piece: nn.Module) -> set[int]:
        """Return the parameters that meet all tokens without being split: first module, routers."""
        routers = holders(path for path, _ in experts_of(piece))
        modules = [module for _, module in modules_at(piece, (layout_of(piece).first, *routers))]
        return {id(parameter) for module in modules for parameter in module.parameters()}

    def _on_slices(self, piece: nn.Module) -> set[str]:
        """Return the parameters that act on slices, of a model or a stage of one."""
        names = {name for name, _ in piece.named_parameters()}
        of_models = (ones & names for every, ones in self.on_slices.values() if names <= every)
        return next(of_models, set())

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        parts, here = self.degree, footprint.place[self.axis]

        def split(piece: ModelPart) -> ModelPart:
            dims, layout = split_dims(piece.outline), layout_of(piece.outline)
            cores = {c.path for c in piece.calls_at((f"{layout.blocks}.*.{layout.attention}",))}
            calls = (c.cut(1, parts, here) if c.path in cores else c for c in piece.calls)
            kept = kept_by_rank(piece, parts, self.sequence_parallel, self.loss_parallel)
            return replace(piece, calls=tuple(calls), kept=tuple(kept)).map(
                lambda w: w.split(self.axis, dims[w.name], parts, here) if w.name in dims else w
            )

        return footprint.map(split)

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        m, messages = footprint.micro_batches, []
        for piece in footprint.pieces:
            for operation, elements, products in edge_messages(piece, self.sequence_parallel):
                itemsize = footprint.compute_bytes if products else footprint.activation_bytes
                messages.append(message(self.axis, operation, [elements], itemsize, m))
            for logits in logits_shapes(piece):
                messages.append(self._loss(logits, footprint.compute_bytes, m))
            names = {name for name, _ in self._with_partial_gradients(piece.outline)}
            parts = [w for w in piece.gradients if self.axis not in w.axes and w.name in names]
            if parts or self.sequence_parallel:
                messages.append(all_reduce_each(self.axis, parts, footprint.reduce_bytes))
        return messages

    def _loss(self, logits: Shape, itemsize: int, micro_batches: int) -> Message:
        tokens = prod(logits[:-1])
        # each token's largest logit, sum of exponentials and target's logit, in fp32 at least
        if self.loss_parallel:
            return message(self.axis, "all_reduce", [tokens] * 3, max(4, itemsize), micro_batches)
        padded = self.degree * -(-logits[-1] // self.degree)
        return message(self.axis, "all_gather", [tokens * padded], itemsize, micro_batches)
