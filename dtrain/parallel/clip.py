"""Clip by the norm of the whole gradient, wherever its parts are.

`torch.nn.utils.clip_grad_norm_` refuses a mix of plain and distributed tensors, and gathers the
norm of each parameter by itself. Here each rank sums squares, and one number travels for each way
of sharding.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import local_part


def clip_gradients(model: nn.Module, plan: Plan) -> Tensor:
    """Scale gradients to at most `plan.clip_norm` (None: leave them); return the norm before.

    Collective.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    copies = {id(p.grad) for p in plan.duplicated_parameters(model)}
    norm = _norm([gradient for gradient in gradients if id(gradient) not in copies], plan)
    if plan.clip_norm is not None:
        factor = clip_factor(norm, plan.clip_norm).to(plan.storage)
        for gradient in gradients:
            local_part(gradient).mul_(factor)
    for strategy in plan.strategies:
        norm = strategy.combine_norm(norm, plan)
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that makes a norm at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _norm(gradients: list[Tensor], plan: Plan) -> Tensor:
    groups: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[_sharded_over(gradient)].append(local_part(gradient))
    square = torch.zeros((), device=plan.device, dtype=torch.float64)
    for axes, parts in sorted(groups.items()):  # ranks that differ in the order would hang
        norms = [
            torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in parts
        ]
        part = torch.stack(norms).to(square).square().sum()
        for axis in axes:
            dist.all_reduce(part, group=plan.mesh[axis].get_group())
        square += part
    if plan.strategy_on("pp"):
        dist.all_reduce(square, group=plan.mesh["pp"].get_group())
    return square.sqrt()


def _sharded_over(tensor: Tensor) -> tuple[str, ...]:
    """Return the mesh axes over which a tensor is divided."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    return tuple(
        name for name, p in zip(names, tensor.placements, strict=True) if not p.is_replicate()
    )
