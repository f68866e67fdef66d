"""What tensor parallelism does at the edges of split layers: who sends what there, forward and
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dtrain.model.layout import experts_of, holders, layout_of, modules_at, multiples, shared_names
from dtrain.parallel.footprint import Activation, ModelPart, ModuleCall, Shape
from dtrain.parallel.footprint import chunk_shape as chunk


def split_parameter(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Leave this rank's slice of a parameter, where the module has it; needs no communication."""
    parameter = getattr(module, name, None)
    if parameter is not None:
        mine = distribute_tensor(parameter.detach(), mesh, (Shard(dim),), src_data_rank=None)
        setattr(module, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))


def is_split(parameter: object) -> bool:
    """Does tensor parallelism know this parameter, cut or not?

    Then its gradient is whole already.
    """
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())


def whole_logits(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook on the model: in evaluation logits are whole, for whatever is measured of them.

    And an output that is a view, as of a distributed tensor, would lose the hooks that FSDP sets on
    it.
    """
    if isinstance(output, DTensor):
        return output if module.training else output.full_tensor()
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def gather_input(mesh: DeviceMesh, outer: Placement, *, local: bool = False) -> Any:
    """A hook: give the module its input whole; a distributed one for column layers, which share
    its gradient's sum.
    """

    def hook(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict]:
        # of a model whose modules call each other by names
        first = next(iter(named)) if not inputs else None
        x = inputs[0] if first is None else named[first]
        x = DTensor.from_local(x, mesh, (outer,), run_check=False).redistribute(
            placements=(Replicate(),)
        )
        x = x.to_local() if local else x
        return ((x, *inputs[1:]), named) if first is None else ((), {**named, first: x})

    return hook


def sum_experts(
    forward: Callable[[Tensor, Tensor], Tensor], mesh: DeviceMesh
) -> Callable[[Tensor, Tensor], Tensor]:
    """Experts of which each rank has some hidden units: the sum of what they give is the whole."""

    @torch.compiler.disable
    def summed(x: Tensor, counts: Tensor) -> Tensor:
        shared = DTensor.from_local(x, mesh, (Replicate(),), run_check=False).to_local(
            grad_placements=(Partial(),)
        )
        y = DTensor.from_local(forward(shared, counts), mesh, (Partial(),), run_check=False)
        return y.redistribute(placements=(Replicate(),)).to_local()

    return summed


def slice_output(mesh: DeviceMesh) -> Any:
    """A hook: of an output that every rank has, go on with this rank's tokens."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = DTensor.from_local(output, mesh, (Replicate(),), run_check=False)
        return whole.redistribute(placements=(Shard(1),)).to_local()

    return hook


def split_dims(model: nn.Module) -> dict[str, int | None]:
    """By name, the dim that is cut of each parameter that tensor parallelism knows; None: it
    stays whole.
    """
    layout, shared = layout_of(model), shared_names(model)
    dims: dict[str, int | None] = {}
    for path, layer in modules_at(model, layout.column + layout.vocabulary):
        dims |= {
            shared.get(name, name): 0
            for name in (f"{path}.{key}" for key, _ in layer.named_parameters())
        }
    for path, layer in modules_at(model, layout.row):
        dims |= {
            f"{path}.{key}": 1 if key == "weight" else None for key, _ in layer.named_parameters()
        }
    return dims | {
        f"{path}.{key}": dim for path, _ in experts_of(model) for key, dim in layout.hidden
    }


def refuse_lost_rows(model: nn.Module, tp: int, fsdp: int) -> None:
    """Refuse rows that `fsdp` would cut after `tp`, where torch does not find which of them are
    whose.

    torch 2.13 counts wrong for some sizes that `tp` does not divide: ranks would be given others'
    rows, or none.
    """
    dims = split_dims(model)
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0] if dims.get(name) == 0 else 0
        if rows % tp and not all(
            _found(rows, tp, fsdp, i, j) for i in range(fsdp) for j in range(tp)
        ):
            raise ValueError(
                f"torch loses count of the {rows} rows of {name}, cut by tp={tp} and then by "
                f"fsdp={fsdp}: "
                f"use {multiples(rows, tp)} rows, or other degrees"
            )


def _found(rows: int, tp: int, fsdp: int, fsdp_rank: int, tp_rank: int) -> bool:
    start, size = _part(*_part(0, rows, tp, tp_rank), fsdp, fsdp_rank)
    placements = (_StridedShard(0, split_factor=tp), Shard(0))
    shape, offset = _compute_local_shape_and_global_offset(
        (rows,), (fsdp, tp), [fsdp_rank, tp_rank], placements
    )
    return shape == (size,) and (not size or offset == (start,))


def _part(start: int, size: int, parts: int, index: int) -> tuple[int, int]:
    """Where a part begins and how long it is."""
    return start + min(size, index * -(-size // parts)), chunk((size,), 0, parts, index)[0]


def edge_messages(piece: ModelPart, sequence_parallel: bool) -> Iterator[tuple[str, int, bool]]:
    """What travels at the edges of a piece's split layers for one micro-batch.

    Yields the collective, its elements, and whether they come straight from products: in mixed
    precision those are narrow, though what lies between layers may not be.
    """
    layout, at = layout_of(piece.outline), piece.calls_at
    gathered, summed = ("all_gather", "reduce_scatter") if sequence_parallel else ("", "all_reduce")
    splitters = holders(path for path, _ in modules_at(piece.outline, layout.column))
    experts = tuple(path for path, _ in experts_of(piece.outline))
    routers = holders(experts)
    yield from _inputs(at(splitters) + at(_paths(piece, nn.Linear)), gathered, summed)
    yield from _outputs(at(layout.row), summed, gathered, products=True)
    yield from _outputs(at(_paths(piece, nn.Embedding)), "all_reduce", "")
    yield from _outputs(at((layout.first,)), "", gathered)
    yield from _inputs(at(routers), gathered, "")
    yield from _outputs(at(routers), "", gathered)
    yield from _inputs(at(experts), "", "all_reduce")
    yield from _outputs(at(experts), "all_reduce", "", products=True)


def kept_by_rank(
    piece: ModelPart, parts: int, sequence_parallel: bool, loss_parallel: bool
) -> Iterator[Activation]:
    """A piece's activations on one rank: cut within split layers; what goes into them is whole."""
    layout, model = layout_of(piece.outline), piece.outline
    splitters = holders(path for path, _ in modules_at(model, layout.column))
    rows, experts = {path for path, _ in modules_at(model, layout.row)}, dict(experts_of(model))
    routers = holders(experts)
    parameters = (
        (getattr(e, name, None), dim) for e in experts.values() for name, dim in layout.hidden
    )
    hidden = {parameter.shape[dim] for parameter, dim in parameters if parameter is not None}
    logits = _paths(piece, nn.Linear)
    whole = {*splitters, *routers, *logits}
    for kept in piece.kept:
        if kept.within(experts):
            divided = kept.shape[-1:] and kept.shape[-1] in hidden
        elif kept.path is None or kept.path in logits:
            divided = loss_parallel
        elif kept.within(splitters) and kept.path not in rows:
            divided = True
        else:
            divided = sequence_parallel and not kept.within(routers) and not kept.feeds & whole
        yield kept.divide(parts) if divided else kept


def logits_shapes(piece: ModelPart) -> list[Shape]:
    """Shapes of the logits that a piece computes of one micro-batch."""
    return [call.output for call in piece.calls_at(_paths(piece, nn.Linear)) if call.output]


def _paths(piece: ModelPart, kind: type[nn.Module]) -> tuple[str, ...]:
    layers = modules_at(piece.outline, layout_of(piece.outline).vocabulary)
    return tuple(path for path, layer in layers if isinstance(layer, kind))


def _inputs(
    calls: Iterable[ModuleCall], forward: str, backward: str
) -> Iterator[tuple[str, int, bool]]:
    for call in calls:
        for operation in (forward, backward if call.returns else ""):
            if operation:
                yield operation, prod(call.inputs[0]), False


def _outputs(
    calls: Iterable[ModuleCall], forward: str, backward: str, *, products: bool = False
) -> Iterator[tuple[str, int, bool]]:
    for call in calls:
        for operation in (forward, backward if call.graded else ""):
            if operation and call.output:
                yield operation, prod(call.output), products
