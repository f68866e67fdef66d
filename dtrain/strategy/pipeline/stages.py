"""A model split into stages: how many blocks each one gets, what it keeps, and what two share."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn

from dtrain.model.layout import Absent, blocks_of, layout_of, shared_names
from dtrain.parallel.strategy import local_part
from dtrain.strategy.pipeline.schedule import Schedule


def split_evenly(model: nn.Module, stages: int) -> list[int]:
    """Return how many blocks each stage gets, so that the costliest stage costs least.

    Each gets one at least. A module's cost is the size of the matrices that its activations are
    multiplied by; the first stage has the model's first module too, the last stage its last.
    """
    layout = layout_of(model)
    costs = [_products(block) for block in blocks_of(model)]
    first, last = (_products(model.get_submodule(path)) for path in (layout.first, layout.last))

    @lru_cache
    def best(start: int, stage: int) -> tuple[int, int, tuple[int, ...]]:
        """(greatest cost, sum of squares, blocks of each stage) from this block and stage on."""
        is_last = stage == stages - 1
        ends = [len(costs)] if is_last else range(start + 1, len(costs) - (stages - stage - 1) + 1)
        splits = []
        for end in ends:
            cost = sum(costs[start:end]) + first * (stage == 0) + last * is_last
            greatest, squares, rest = (0, 0, ()) if is_last else best(end, stage + 1)
            splits.append((max(cost, greatest), cost**2 + squares, (end - start, *rest)))
        return min(splits)

    return list(best(0, 0)[2])


def _products(module: nn.Module) -> int:
    """Multiplications a token: an embedding is looked up, not multiplied."""
    layers = [m for m in module.modules() if not isinstance(m, nn.Embedding)]
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.ndim > 1)


def keep_stage(model: nn.Module, stage: int, counts: list[int]) -> nn.Module:
    """Delete what a stage does not hold from the whole model, and return it.

    Args:
        counts: blocks of each stage.
    """
    layout, last = layout_of(model), len(counts) - 1
    shared = shared_names(model)
    start, blocks = sum(counts[:stage]), model.get_submodule(layout.blocks)
    for index, name in enumerate(dict(blocks.named_children())):
        if not start <= index < start + counts[stage]:
            delattr(blocks, name)  # by name: the others keep theirs
    if stage > 0:
        model.set_submodule(layout.first, Absent())
    if stage < last:
        model.set_submodule(layout.last, Absent())
    elif stage > 0:
        for alias, name in shared.items():
            keep_name(model, alias, name)
    return model


def keep_name(model: nn.Module, alias: str, name: str) -> None:
    """Register the parameter `alias` at `name` too, where the module that had it is gone.

    So a stage's copy of a shared parameter has its name in the whole model: it starts from the same
    values, and is saved and loaded as the same.
    """
    owner = model
    *path, key = name.split(".")
    for part in path:
        if part not in dict(owner.named_children()):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_parameter(key, model.get_parameter(alias))


def sum_ends(
    name: str, stages: dict[int, nn.Module], schedule: Schedule, group: dist.ProcessGroup
) -> None:
    """Give the parameter that first and last stage share the sum of both gradients, on both.

    Args:
        stages: this rank's. The ranks of first and last stage must call it.
    """
    last = schedule.stages - 1
    ends = [stages[stage].get_parameter(name) for stage in (0, last) if stage in stages]
    gradients = [local_part(end.grad) for end in ends if end.grad is not None]
    if len(gradients) == 2:  # a V schedule: both on this rank
        gradients[0].add_(gradients[1])
        gradients[1].copy_(gradients[0])
    elif gradients:
        peer = schedule.owner(0 if last in stages else last)
        other = torch.empty_like(gradients[0])
        sending = dist.P2POp(dist.isend, gradients[0], group=group, group_peer=peer)
        receiving = dist.P2POp(dist.irecv, other, group=group, group_peer=peer)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()
        gradients[0].add_(other)
