"""Data parallel that composes: FSDP's machinery with nothing sharded.

    alone:         as ddp: every rank holds all of W; all-reduce of the gradients
    beside fsdp:   hybrid sharding (HSDP). Ranks form a grid; each row of it shards W, and the rows
                   hold the same. Gradients: reduce-scatter along a row, all-reduce across rows.

Cost a step, per rank: one all-reduce of the gradients it holds (all of them, or 1/f beside fsdp of
degree f), in precision.reduce: 2 (n-1)/n times their bytes on a ring.
Source: Zhao et al. 2023, "PyTorch FSDP" (2304.11277), section 3.2.2 for hybrid sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.model.layout import blocks_of
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.fsdp_units import (
    accumulate_losses,
    begin_update,
    refuse_sharing,
    unit_calls,
    unused_parameters,
    watch_units,
)
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import ParallelContext, Strategy


class Replicate(Strategy):
    """Average gradients over `dp`, by torch's composable `replicate`.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
    """

    name = "replicate"
    axis = "dp"
    casts_itself = True
    beside_fsdp = False  # set by parallelize

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        if plan.strategy_on("fsdp") is None:
            refuse_sharing(model, "replicate")

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        self.beside_fsdp = plan.strategy_on("fsdp") is not None
        if self.beside_fsdp:
            return model  # fully_shard was given both axes and does the all-reduce too
        mesh, policy = plan.mesh[self.axis], plan.precision.fsdp_policy()
        for module in (*blocks_of(model), model):
            replicate(module, mesh=mesh, mp_policy=policy)
        watch_units(model, mesh.mesh.flatten().tolist())
        return model

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not replicated over {self.axis}"
            axes = parameter.device_mesh.mesh_dim_names or ()
            assert self.axis in axes, f"{name} lives on {axes}, not on {self.axis}"
            placement = parameter.placements[axes.index(self.axis)]
            assert placement.is_replicate(), f"{name}: {parameter.placements}"

    def double_backward_context(self, model: nn.Module) -> AbstractContextManager[None]:
        return kept_gathered(model)

    def begin_update(self, model: nn.Module) -> None:
        begin_update(model)

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        # fsdp says whether gradients are reduce-scattered; the all-reduce waits for the last
        if self.beside_fsdp:
            fsdp_module(model).set_requires_all_reduce(enabled)
        else:
            fsdp_module(model).set_requires_gradient_sync(enabled)

    def unused(self, model: nn.Module) -> list[nn.Parameter]:
        return [] if self.beside_fsdp else unused_parameters(model)

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        return {} if self.beside_fsdp else unit_calls(model)

    def after_evaluation(self, model: nn.Module) -> None:
        reshard(model)

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        sizes = footprint.unit_gradients(plan.degrees.get("fsdp", 1))
        return [message(self.axis, "all_reduce", sizes, footprint.reduce_bytes)]


def fsdp_module(model: nn.Module) -> FSDPModule:
    """Return a model as what `fully_shard` or `replicate` has made of it."""
    assert isinstance(model, FSDPModule), (
        f"{type(model).__name__} is neither sharded nor replicated"
    )
    return model


@contextmanager
def kept_gathered(model: nn.Module) -> Iterator[None]:
    """Keep gathered weights from one backward pass to the next, which needs them; then free them.

    Were they not freed, the next forward pass would not see what the optimizer does.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_backward(False, recurse=False)
    accumulate_losses(model, True)
    yield
    accumulate_losses(model, False)
    for module in modules:
        module.reshard()
        module.set_reshard_after_backward(True, recurse=False)


def reshard(model: nn.Module) -> None:
    """Free gathered weights that forward has kept for a backward pass, after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
