"""Tensor parallel: each rank computes every layer on its slice of the heads, hidden units and vocabulary.

    Y = f(X A) B,  A = [A1 | A2] cut by columns,  B = [B1 / B2] cut by rows:
    rank 1: f(X A1) B1 \\
    rank 2: f(X A2) B2 /  all-reduce: the sum is Y, the same on both ranks
    sequence parallel: what lies between (norms, residuals) is cut by tokens; all-gather X, reduce-scatter Y

Embedding and head are cut by vocabulary; the loss needs each token's largest logit, the sum of exponentials
and the target's logit only, so whole logits never travel. On GPUs torch can overlap these messages with the
products (asynchronous TP: torch.compile and symmetric memory); on a CPU it cannot.
Cost a block and micro-batch, per rank: 2 all-reduces of (B, T, C) forward and 2 backward; with sequence
parallelism each becomes an all-gather and a reduce-scatter: the same bytes, 1/n of the memory between layers.
Sources: Shoeybi et al. 2019, Megatron-LM (1909.08053); Korthikanti et al. 2022 (2205.05198).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Size, nn
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

from dtrain.batch import pieces
from dtrain.layout import experts_of, layout_of, modules_at, shared_names
from dtrain.split import cut, gather, is_split, own, split_parameter, summed
from dtrain.strategy.base import REST, Strategy, divisors, local
from dtrain.strategy.expert import with_local_weights

if TYPE_CHECKING:
    from dtrain.plan import Plan
    from dtrain.task.base import Task


class Tensor(Strategy):
    """Split the layers that the model's Layout names `column`, `row` and `vocabulary` over `tp`.

    Args:
        degree: ranks along `tp`; -1: the rest of the world.
        sequence_parallel: cut what lies between those layers by tokens.
        loss_parallel: keep the logits cut by vocabulary; false: gather them.
    """

    axis = "tp"
    splits = ""

    def __init__(self, degree: int = REST, *, sequence_parallel: bool = False, loss_parallel: bool = True) -> None:
        super().__init__(degree)
        self.sequence_parallel, self.loss_parallel = sequence_parallel, loss_parallel

    def check_model(self, model: nn.Module, plan: Plan) -> None:
        name, layout, n = type(model).__name__, layout_of(model), self.degree
        if not layout.column:
            raise ValueError(f"{name} names no `column` layers in its Layout: nothing to split over tp")
        if self.sequence_parallel and not layout.first:
            raise ValueError(
                f"{name} names no `first` module in its Layout: no tokens to cut; use sequence_parallel=false"
            )
        for size in layout.sizes:
            if (number := getattr(model, size, None)) and number % n:
                raise ValueError(f"{size}={number} is not divisible by tp={n}: use {divisors(number)}")
        for path, layer in modules_at(model, layout.column):
            if isinstance(layer, nn.Linear) and layer.out_features % n:
                raise ValueError(f"the {layer.out_features} outputs of {name}'s {path} are not divisible by tp={n}: "
                                 f"use {divisors(layer.out_features)}")  # fmt: skip

    def check_task(self, task: Task, plan: Plan) -> None:
        if not self.sequence_parallel:
            return
        length = next(t.shape[1] for t in task.batch(0).values() if t.ndim > 1)
        parts = self.degree * plan.degrees.get("cp", 1)
        if length % parts:
            near = f"{length // parts * parts} or {(length // parts + 1) * parts}"
            raise ValueError(f"seq_len={length} is not divisible by {parts} (tp x cp, sequence_parallel): use {near}")

    def parallelize(self, model: nn.Module, plan: Plan) -> nn.Module:
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
                logits: Placement = Shard(-1) if self.loss_parallel else Replicate()
                styles[path] = ColwiseParallel(
                    input_layouts=outer, output_layouts=logits, use_local_output=not self.loss_parallel
                )
        for path, style in styles.items():
            parallelize_module(model.get_submodule(path), mesh, style, src_data_rank=None)
        for alias, name in shared.items():  # what was one parameter is one again: whichever of its places was split
            split = next((n for n in (name, alias) if is_split(model.get_parameter(n))), name)
            for place in (name, alias):
                path, _, key = place.rpartition(".")
                setattr(model.get_submodule(path), key, model.get_parameter(split))
        for _, experts in experts_of(model):
            for name, dim in layout.hidden:
                split_parameter(experts, name, dim, mesh)
            experts.forward = summed(with_local_weights(experts), mesh)

    def _join_edges(self, model: nn.Module, mesh: DeviceMesh, outer: Placement) -> None:
        layout = layout_of(model)
        for holder in dict.fromkeys(path.rpartition(".")[0] for path, _ in modules_at(model, layout.column)):
            model.get_submodule(holder).register_forward_pre_hook(gather(mesh, outer), with_kwargs=True)
        if self.sequence_parallel:
            for _, first_module in modules_at(model, (layout.first,)):
                first_module.register_forward_hook(cut(mesh))
            for path, _ in experts_of(model):  # their router sees whole rows
                router = model.get_submodule(path.rpartition(".")[0])
                router.register_forward_pre_hook(gather(mesh, outer, local=True), with_kwargs=True)
                router.register_forward_hook(cut(mesh))
        model.register_forward_hook(own)

    def verify(self, model: nn.Module, plan: Plan) -> None:
        layout = layout_of(model)
        for path, layer in modules_at(model, layout.column + layout.row):
            assert is_split(layer.weight), f"{path} is not split over {self.axis}"

    @contextmanager
    def around(self, plan: Plan) -> Iterator[None]:
        with loss_parallel(), implicit_replication():
            yield

    def activation(self, shape: Size) -> Size:
        rows, tokens, *others = shape
        return Size((rows, tokens // self.degree if self.sequence_parallel else tokens, *others))

    def reduce_gradients(self, model: nn.Module, plan: Plan) -> None:
        for piece in pieces(model):
            for parameter in piece.parameters():
                if isinstance(parameter.grad, DTensor):  # an embedding's is made whole: keep this rank's rows of it
                    assert isinstance(parameter, DTensor)
                    parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
            if self.sequence_parallel:  # what is not split has seen this rank's tokens only
                whole = self._see_all(piece)
                for parameter in piece.parameters():
                    if parameter.grad is not None and not is_split(parameter) and id(parameter) not in whole:
                        dist.all_reduce(local(parameter.grad), group=plan.mesh[self.axis].get_group())

    def _see_all(self, piece: nn.Module) -> set[int]:
        """Parameters to which every token comes though they are not split: of the first module, and of routers."""
        holders = [path.rpartition(".")[0] for path, _ in experts_of(piece)]
        modules = [module for _, module in modules_at(piece, (layout_of(piece).first, *holders))]
        return {id(parameter) for module in modules for parameter in module.parameters()}
