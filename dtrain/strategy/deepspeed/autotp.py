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

if TYPE_CHECKING:
    from dtrain.task.base import Task


class AutoTP(Strategy):
    """Split the layers that the model's Layout names `column` and `row` over `tp`, by DeepSpeed's
    engine.

    Args:
        degree: ranks along `tp`; -1: the rest of the world.
    """

    name = "deepspeed_autotp"
    axis = "tp"
    stepped = (ROWS, COLUMNS)
    engine = "deepspeed"
    divides = ""

    def check(self, plan: ParallelContext) -> None:
        if getattr(plan.strategy_on("dp"), "stage", None) is None or len(plan.strategies) > 2:
            raise ValueError(
                "strategy autotp is DeepSpeed's: use strategy=deepspeed_autotp, or tensor "
                "beside others"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        layout, n = layout_of(model), self.degree
        if not layout.column:
            raise ValueError(
                f"{type(model).__name__} names no `column` layers in its Layout: nothing to "
                f"split over "
                f"tp; use a strategy on dp or fsdp"
            )
        if layout.experts and list(modules_at(model, (f"{layout.blocks}.*.{layout.experts}",))):
            raise ValueError("DeepSpeed's AutoTP does not cut experts: use strategy=tensor")
        for size in layout.sizes:
            if (number := getattr(model, size, None)) and number % n:
                raise ValueError(
                    f"{size}={number} is not divisible by tp={n}: use {divisors(number)}"
                )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if task.followers:
            raise ValueError(
                f"{', '.join(task.followers)} of task {type(task).__name__} follows another "
                f"model and is "
                f"not trained: DeepSpeed's AutoTP cuts only what it trains; "
                f"use strategy=tensor"
            )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        yield split_on_ranks(model, self.degree, False)

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """What DeepSpeed's configuration says of it."""
        layout = layout_of(model)
        specs = [
            {
                "patterns": [
                    rf".*{re.escape(path)}\.weight$".replace(r"\*", "[^.]+") for path in paths
                ],
                "partition_type": kind,
            }
            for kind, paths in (
                ("column", layout.column),
                ("row", layout.row),
                ("skip", layout.vocabulary),
            )
            if paths
        ]
        return {
            "autotp_size": self.degree,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        }

    def joined(
        self, model: nn.Module, tensors: dict[str, Tensor], plan: ParallelContext
    ) -> dict[str, Tensor]:
        """The same tensors, whole: what each rank along `tp` has of them. A collective."""
        dims, found = _dims(model), dict(tensors)
        for name, tensor in sorted(tensors.items()):
            if (dim := dims.get(_parameter(name))) is not None and tensor.ndim:
                parts = [
                    torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    for _ in range(self.degree)
                ]
                dist.all_gather(parts, tensor.contiguous(), group=plan.mesh[self.axis].get_group())
                found[name] = torch.cat(parts, dim)
        return found

    def parted(
        self, model: nn.Module, tensors: dict[str, Tensor], plan: ParallelContext
    ) -> dict[str, Tensor]:
        """Of whole tensors, what this rank has of them."""
        dims, here = _dims(model), plan.mesh[self.axis].get_local_rank()
        return {
            name: tensor.chunk(self.degree, dim)[here]
            if (dim := dims.get(_parameter(name))) is not None and tensor.ndim
            else tensor
            for name, tensor in tensors.items()
        }

    def verify_engine(self, model: nn.Module, whole: dict[str, torch.Size]) -> None:
        """Asked = got: each layer has its part of the rows or columns."""
        for name, dim in _dims(model).items():
            if dim is not None:
                parameter = model.get_parameter(name)
                mine = getattr(parameter, "ds_shape", parameter.shape)[dim]
                assert mine * self.degree == whole[name][dim], (
                    f"{name}: {mine} of {whole[name][dim]} on {self.degree}"
                )

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        raise ValueError("the messages of DeepSpeed's AutoTP are not told")


def _dims(model: nn.Module) -> dict[str, int | None]:
    layout = layout_of(model)
    dims: dict[str, int | None] = {}
    for path, layer in modules_at(model, layout.column):
        dims |= {f"{path}.{key}": 0 for key, _ in layer.named_parameters()}
    for path, layer in modules_at(model, layout.row):
        dims |= {
            f"{path}.{key}": 1 if key == "weight" else None for key, _ in layer.named_parameters()
        }
    return dims


def _parameter(name: str) -> str:
    """The parameter that a tensor belongs to: itself, or that whose state it is."""
    return (
        name.removeprefix(OPTIMIZER_STATE).rpartition(".")[0]
        if name.startswith(OPTIMIZER_STATE)
        else name
    )
