"""Layers split over `tp`: the slices of their parameters, and what their edges do, as hooks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

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

from dtrain.model.initialize import build_with_values, on_meta
from dtrain.model.layout import (
    experts_of,
    is_foreign,
    layout_of,
    modules_at,
    multiples,
    shared_names,
)
from dtrain.parallel.checks.rehearsal import DoesNotRun, parameters_between
from dtrain.parallel.footprint import chunk_shape
from dtrain.strategy.expert import Forward, uncompiled

if TYPE_CHECKING:
    from dtrain.task.base import Task


def split_dims(model: nn.Module) -> dict[str, int | None]:
    """Return the dim that is cut, by the name of each parameter that `tp` knows; None: none is."""
    layout, shared = layout_of(model), shared_names(model)
    dims: dict[str, int | None] = {}
    for path, layer in modules_at(model, layout.column + layout.vocabulary):
        names = (f"{path}.{key}" for key, _ in layer.named_parameters())
        dims |= {shared.get(name, name): 0 for name in names}
    for path, layer in modules_at(model, layout.row):
        keys = (key for key, _ in layer.named_parameters())
        dims |= {f"{path}.{key}": 1 if key == "weight" else None for key in keys}
    return dims | {
        f"{path}.{key}": dim for path, _ in experts_of(model) for key, dim in layout.hidden
    }


def refuse_lost_rows(model: nn.Module, tp: int, fsdp: int) -> None:
    """Raise ValueError for rows that `fsdp` would cut after `tp`, where torch miscounts them.

    torch 2.13 counts wrong for some sizes that `tp` does not divide: ranks would be given others'
    rows, or none.
    """
    dims = split_dims(model)
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0] if dims.get(name) == 0 else 0
        if rows % tp and not all(
            _is_counted(rows, tp, fsdp, i, j) for i in range(fsdp) for j in range(tp)
        ):
            raise ValueError(
                f"torch loses count of the {rows} rows of {name}, cut by tp={tp} and then by "
                f"fsdp={fsdp}: use {multiples(rows, tp)} rows, or other degrees"
            )


def _is_counted(rows: int, tp: int, fsdp: int, fsdp_rank: int, tp_rank: int) -> bool:
    """Return whether torch finds the rows of one rank."""
    start, size = _part(*_part(0, rows, tp, tp_rank), fsdp, fsdp_rank)
    placements = (_StridedShard(0, split_factor=tp), Shard(0))
    shape, offset = _compute_local_shape_and_global_offset(
        (rows,), (fsdp, tp), [fsdp_rank, tp_rank], placements
    )
    return shape == (size,) and (not size or offset == (start,))


def _part(start: int, size: int, parts: int, index: int) -> tuple[int, int]:
    """Return where a part begins and how long it is."""
    return start + min(size, index * -(-size // parts)), chunk_shape((size,), 0, parts, index)[0]


def parameters_on_slices(task: Task) -> dict[str, tuple[set[str], set[str]]]:
    """Return the parameters of each user's model, and those of them that act on slices.

    A rank has a part of the gradients of the latter. dtrain's own models have none of these.
    """
    batch = {name: tensor[:2] for name, tensor in task.batch(0).items()}
    shapes = {name: tensor.to("meta") for name, tensor in batch.items()}
    outlines = {name: on_meta(factory) for name, factory in task.models.items()}
    if all(model is not None and not is_foreign(model) for model in outlines.values()):
        return {}
    on_slices: dict[str, tuple[set[str], set[str]]] = {}
    for update in task.updates:
        name, models = update.trains, {n: m for n, m in outlines.items() if m is not None}
        try:
            if len(models) < len(outlines):
                raise DoesNotRun
            names = parameters_between(models[name], partial(update.loss, models, shapes))
        except DoesNotRun:  # it computes with values
            models = {
                n: build_with_values(factory, 0, torch.float32)
                for n, factory in task.models.items()
            }
            try:
                names = parameters_between(models[name], partial(update.loss, models, batch))
            except DoesNotRun as error:
                raise ValueError(
                    f"{type(models[name]).__name__} does not run on two rows, so nothing tells "
                    f"what tp would divide: {error}; let it run on one process first"
                ) from error
        every = {n for n, _ in models[name].named_parameters()}
        _, of_earlier_updates = on_slices.get(name, (every, set()))
        on_slices[name] = every, names | of_earlier_updates
    return on_slices


def split_parameter(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Leave this rank's slice of a parameter, where the module has it; needs no communication."""
    parameter = getattr(module, name, None)
    if parameter is not None:
        part = distribute_tensor(parameter.detach(), mesh, (Shard(dim),), src_data_rank=None)
        setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def is_split(parameter: object) -> bool:
    """Return whether `tp` knows this parameter, cut or not: then its gradient is whole already."""
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())


def gather_input(mesh: DeviceMesh, outer: Placement, *, local: bool = False) -> Any:
    """Return a hook that gives a module its input whole.

    Args:
        outer: how the input lies between layers.
        local: as a plain tensor; false: a distributed one for column layers, which share the sum of
            its gradient.
    """

    def hook(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # of a model whose modules call each other by names
        first = next(iter(named)) if not inputs else None
        x = inputs[0] if first is None else named[first]
        x = DTensor.from_local(x, mesh, (outer,), run_check=False).redistribute(
            placements=(Replicate(),)
        )
        x = x.to_local() if local else x
        return ((x, *inputs[1:]), named) if first is None else ((), {**named, first: x})

    return hook


def slice_output(mesh: DeviceMesh) -> Any:
    """Return a hook that leaves this rank's tokens of an output that every rank has."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = DTensor.from_local(output, mesh, (Replicate(),), run_check=False)
        return whole.redistribute(placements=(Shard(1),)).to_local()

    return hook


def whole_logits(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Gather a model's logits in evaluation, where anything may be measured of them: a hook.

    An output that is a view, as of a distributed tensor, is copied: it would lose the hooks that
    FSDP sets on it.
    """
    if isinstance(output, DTensor):
        return output if module.training else output.full_tensor()
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def sum_experts(forward: Forward, mesh: DeviceMesh) -> Forward:
    """Return a forward pass of experts that sums what each rank's hidden units give."""

    @uncompiled
    def summed(x: Tensor, counts: Tensor) -> Tensor:
        shared = DTensor.from_local(x, mesh, (Replicate(),), run_check=False).to_local(
            grad_placements=(Partial(),)
        )
        y = DTensor.from_local(forward(shared, counts), mesh, (Partial(),), run_check=False)
        return y.redistribute(placements=(Replicate(),)).to_local()

    return summed
