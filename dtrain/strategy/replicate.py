"""Data parallel that composes: FSDP's machinery with nothing sharded.

    alone:         as ddp: every rank holds all of W; all-reduce of the gradients
    beside fsdp:   hybrid sharding (HSDP). Ranks form a grid; each row of it shards W, and the rows
                   hold the same. Gradients are reduce-scattered along a row, then all-reduced across rows.

Cost a step, per rank: one all-reduce of the gradients it holds (all of them, or 1/f beside fsdp of degree f), in
precision.reduce: 2 (n-1)/n times their bytes on a ring.
Source: Zhao et al. 2023, "PyTorch FSDP" (2304.11277), section 3.2.2 for hybrid sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.batch import pieces
from dtrain.cost import Message, message
from dtrain.footprint import Footprint
from dtrain.layout import blocks_of, layout_of, shared_names
from dtrain.strategy.base import Strategy

if TYPE_CHECKING:
    from dtrain.plan import Plan


class Replicate(Strategy):
    """Average gradients over `dp`, by torch's composable `replicate`.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
    """

    axis = "dp"
    casts = True

    def check_model(self, model: nn.Module, plan: Plan) -> None:
        if plan.on("fsdp") is None:
            refuse_sharing(model, "replicate")

    def parallelize(self, model: nn.Module, plan: Plan) -> nn.Module:
        self.beside_fsdp = plan.on("fsdp") is not None
        if self.beside_fsdp:
            return model  # fully_shard was given both axes and does the all-reduce too
        settings: dict[str, Any] = {"mesh": plan.mesh[self.axis], "mp_policy": plan.precision.fsdp_policy()}
        for block in blocks_of(model):
            replicate(block, **settings)
        replicate(model, **settings)
        watch(model)
        return model

    def verify(self, model: nn.Module, plan: Plan) -> None:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not replicated over {self.axis}"
            names = parameter.device_mesh.mesh_dim_names or ()
            assert self.axis in names, f"{name} lives on {names}, not on {self.axis}"
            assert parameter.placements[names.index(self.axis)].is_replicate(), f"{name}: {parameter.placements}"

    def second_order(self, model: nn.Module) -> AbstractContextManager:
        return kept_gathered(model)

    def begin_update(self, model: nn.Module) -> None:
        begin_update(model)

    def unused(self, model: nn.Module) -> list[nn.Parameter]:
        return [] if self.beside_fsdp else unused(model)

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        return {} if self.beside_fsdp else unit_calls(model)

    def after_evaluation(self, model: nn.Module) -> None:
        reshard(model)

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        if self.beside_fsdp:  # which says whether gradients are reduce-scattered; the all-reduce waits for the last
            fsdp_module(model).set_requires_all_reduce(enabled)
        else:
            fsdp_module(model).set_requires_gradient_sync(enabled)

    def cost(self, footprint: Footprint, plan: Plan) -> list[Message]:
        sizes = footprint.unit_gradients(plan.degrees.get("fsdp", 1))
        return [message(self.axis, "all_reduce", sizes, footprint.reduce_bytes)]


def fsdp_module(model: nn.Module) -> FSDPModule:
    """The model, known to be what `fully_shard` or `replicate` has made of it."""
    assert isinstance(model, FSDPModule), f"{type(model).__name__} is neither sharded nor replicated"
    return model


class Unit:
    """What `fully_shard` or `replicate` exchange together, watched: how often it ran, and which gradients it had."""

    def __init__(self, group: Any) -> None:
        self.group, self.calls = group, 0
        self.used: set[int] = set()  # its parameters that backward has reached in this update
        self._forward, self._complete = group.pre_forward, group.post_backward
        group.pre_forward, group.post_backward = self.forward, self.complete

    def forward(self, *inputs: Any) -> Any:
        self.calls += 1
        return self._forward(*inputs)

    def complete(self, *none: Any) -> None:
        """Before gradients are exchanged: zeros for those that this rank's rows do not have, as all ranks send alike.

        And those of one unit in one format: what waits from earlier micro-batches may be in that of the sum.
        """
        parameters = [p for p in self.group.fsdp_params if hasattr(p, "_unsharded_param")]
        waiting = any(parameter.unsharded_accumulated_grad is not None for parameter in parameters)
        for parameter in parameters:
            whole = parameter._unsharded_param
            if whole.grad is not None or parameter.unsharded_accumulated_grad is not None:
                self.used.add(id(parameter))
            elif self.group.reduce_grads and self.calls and whole.requires_grad:
                whole.grad = torch.zeros_like(whole)
            if self.group.reduce_grads and waiting and parameter.unsharded_accumulated_grad is None:
                parameter.to_accumulated_grad_if_needed()
        self._complete(*none)


def watch(model: nn.Module) -> None:
    """Have every unit of the model watched, from now on."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.units = [Unit(group) for group in module._get_fsdp_state()._fsdp_param_groups]  # type: ignore[assignment]


def units(model: nn.Module) -> Iterator[tuple[str, Unit]]:
    """Those of the model, by the names of their modules."""
    for piece in pieces(model):
        for name, module in piece.named_modules():
            yield from ((name, unit) for unit in getattr(module, "units", ()))


def begin_update(model: nn.Module) -> None:
    for _, unit in units(model):
        unit.calls = 0
        unit.used.clear()


def unused(model: nn.Module) -> list[nn.Parameter]:
    """What has a gradient of zeros alone, since backward has not reached it."""
    return [p.sharded_param for _, unit in units(model) for p in unit.group.fsdp_params if id(p) not in unit.used]


def unit_calls(model: nn.Module) -> dict[str, int]:
    """How often each block has run; all the rest of a model runs on every rank."""
    return {name: unit.calls for name, unit in units(model) if name}


def refuse_sharing(model: nn.Module, strategy: str) -> None:
    """Raise ValueError for a weight that stands in two units, which would each keep a copy of their own."""
    path = layout_of(model).blocks

    def unit(name: str) -> str:
        return ".".join(name.split(".")[: path.count(".") + 2]) if path and name.startswith(f"{path}.") else ""

    for one, other in shared_names(model).items():
        if unit(one) != unit(other):
            raise ValueError(
                f"{type(model).__name__} shares {other} with {one}, and strategy {strategy} exchanges each block by "
                f"itself: use strategy=ddp, allreduce or zero1, or keep what is shared in one block or outside of all"
            )


@contextmanager
def kept_gathered(model: nn.Module) -> Iterator[None]:
    """Keep gathered weights from one backward pass to the next, which needs them, and free them after that.

    Were they not freed, the next forward pass would not see what the optimizer does.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_backward(False, recurse=False)
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_backward(True, recurse=False)


def reshard(model: nn.Module) -> None:
    """Free gathered weights: where forward keeps them for backward, an evaluation would leave them behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
