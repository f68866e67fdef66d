"""Tensor parallelism by DeepSpeed's AutoTP, beside its ZeRO on `dp`.

    Y = f(X A) B,  A = [A1 | A2] cut by columns,  B = [B1 / B2] cut by rows: as `tensor`,
    but embedding and head are whole

Which layers are cut by columns and which by rows comes from the model's Layout. DeepSpeed's groups
of ranks are those of `tp`, next to each other. Cost a block and micro-batch, per rank: 2
all-reduces of (B, T, C) forward, one for each layer that shares the input backward (query, key,
value, up: where `tensor` needs two). Source: https://www.deepspeed.ai/tutorials/autotp-training/;
Shoeybi et al. 2019, Megatron-LM (1909.08053).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.model.layout import divisors, layout_of, modules_at
from dtrain.parallel.checks.optimizer import COLUMNS, ROWS
from dtrain.parallel.checks.rehearsal import Rehearsal, split_on_ranks
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.messages import Message
from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.parallel.strategy import ParallelContext, Strategy
from dtrain.strategy.deepspeed.library import ENGINE, check_beside_zero

if TYPE_CHECKING:
    from dtrain.task.base import Task


class AutoTP(Strategy):
    """Split the layers that the model's Layout names `column` and `row` over `tp`.

    Args:
        degree: ranks along `tp`; -1: the rest of the world.
    """

    name = "deepspeed_autotp"
    axis = "tp"
    stepped = (ROWS, COLUMNS)
    engine = ENGINE
    divides = ""

    def check(self, plan: ParallelContext) -> None:
        check_beside_zero(plan, self.name, "strategy=deepspeed_autotp, or tensor beside others")

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        layout = layout_of(model)
        if not layout.column:
            raise ValueError(
                f"{type(model).__name__} names no `column` layers in its Layout: nothing to split "
                f"over tp; use a strategy on dp or fsdp"
            )
        if layout.experts and list(modules_at(model, (f"{layout.blocks}.*.{layout.experts}",))):
            raise ValueError("DeepSpeed's AutoTP does not cut experts: use strategy=tensor")
        for size in layout.sizes:
            if (number := getattr(model, size, None)) and number % self.degree:
                raise ValueError(
                    f"{size}={number} is not divisible by tp={self.degree}: use {divisors(number)}"
                )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if task.followers:
            raise ValueError(
                f"{', '.join(task.followers)} of task {type(task).__name__} follows another model "
                f"and is not trained: DeepSpeed's AutoTP cuts only what it trains; use "
                f"strategy=tensor"
            )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        yield split_on_ranks(model, self.degree, False)

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Return the part of DeepSpeed's configuration that says how the model is cut."""
        layout = layout_of(model)
        kinds = {"column": layout.column, "row": layout.row, "skip": layout.vocabulary}
        specs = [
            {
                "patterns": [rf".*{re.escape(p)}\.weight$".replace(r"\*", "[^.]+") for p in paths],
                "partition_type": kind,
            }
            for kind, paths in kinds.items()
            if paths
        ]
        return {
            "autotp_size": self.degree,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        }

    def verify_engine(self, model: nn.Module, whole: dict[str, torch.Size]) -> None:
        """Asked = got: each layer has its part of the rows or columns of its `whole` shape."""
        for name, dim in _dims(model).items():
            parameter = model.get_parameter(name)
            part = getattr(parameter, "ds_shape", parameter.shape)[dim]
            assert part * self.degree == whole[name][dim], (
                f"{name}: {part} of {whole[name][dim]} on {self.degree}"
            )

    def joined(
        self, model: nn.Module, tensors: dict[str, Tensor], plan: ParallelContext
    ) -> dict[str, Tensor]:
        """Return the tensors with the parts of all ranks along `tp` put together.

        Collective: every rank calls it.
        """
        dims, group = _dims(model), plan.mesh[self.axis].get_group()
        joined = dict(tensors)
        for name, tensor in sorted(tensors.items()):
            if (dim := _dim(name, tensor, dims)) is not None:
                own = tensor.contiguous()
                parts = [torch.empty_like(own) for _ in range(self.degree)]
                dist.all_gather(parts, own, group=group)
                joined[name] = torch.cat(parts, dim)
        return joined

    def parted(
        self, model: nn.Module, tensors: dict[str, Tensor], plan: ParallelContext
    ) -> dict[str, Tensor]:
        """Return this rank's parts of whole tensors."""
        dims, rank = _dims(model), plan.mesh[self.axis].get_local_rank()
        return {
            name: tensor.chunk(self.degree, dim)[rank]
            if (dim := _dim(name, tensor, dims)) is not None
            else tensor
            for name, tensor in tensors.items()
        }

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        raise ValueError("the messages of DeepSpeed's AutoTP are not told")


def _dims(model: nn.Module) -> dict[str, int]:
    """Return the dim of each parameter that is cut, by its name; a row layer's bias is not."""
    layout = layout_of(model)
    return {
        f"{path}.{key}": dim
        for dim, paths in enumerate((layout.column, layout.row))
        for path, layer in modules_at(model, paths)
        for key, _ in layer.named_parameters()
        if dim == 0 or key == "weight"
    }


def _dim(name: str, tensor: Tensor, dims: dict[str, int]) -> int | None:
    """Return the dim in which a parameter or its state is cut; None: it is whole on every rank."""
    if name.startswith(OPTIMIZER_STATE):
        name = name.removeprefix(OPTIMIZER_STATE).rpartition(".")[0]
    return dims.get(name) if tensor.ndim else None
