"""Fully sharded data parallel by Hugging Face's Accelerate: `fully_shard` by its FSDP2 plugin.

    units:     each block, the last norm, and all the rest; each rank keeps 1/n of their weights
    forward:   all-gather a unit's weights -> compute -> free them
    backward:  all-gather them again -> compute -> reduce-scatter the unit's gradients

GPUs only: on a CPU Accelerate would quietly train DDP. Cost a step, per rank: as fsdp, all-gather
of all weights twice and reduce-scatter of all gradients, each (n-1)/n of their bytes on a ring.
Source: https://huggingface.co/docs/accelerate, release 1.15; Zhao et al. 2023, "PyTorch FSDP"
(2304.11277).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtrain.model.layout import blocks_of
from dtrain.parallel.fsdp_units import watch_units
from dtrain.parallel.mesh import REST
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy, local_part
from dtrain.strategy.accelerate.library import (
    AccelerateExecutor,
    accelerator_of,
    check_installed,
    prepare,
    validated,
)
from dtrain.strategy.fsdp import FSDP
from dtrain.task.batch import Models


class AccelerateFSDP(FSDP):
    """Accelerate's FSDP2 over `fsdp`. It stands alone.

    Args:
        degree: ranks along `fsdp`; -1: the rest of the world.
        reshard_after_forward: free the gathered weights after forward, or keep them until backward
            has used them.
        plugin: further settings of Accelerate's `FullyShardedDataParallelPlugin`.
        parallelism: settings of its `ParallelismConfig`, for meshes of two dimensions
            (`dp_replicate_size`, ...).
    """

    name = "accelerate_fsdp"
    stands_alone = ", not beside {others}: use fsdp there"
    one_model = "accelerate_ddp"

    def __init__(
        self,
        degree: int = REST,
        *,
        reshard_after_forward: bool = True,
        plugin: dict[str, Any] | None = None,
        parallelism: dict[str, int] | None = None,
    ) -> None:
        super().__init__(degree, reshard_after_forward=reshard_after_forward)
        self.plugin, self.parallelism = plugin or {}, parallelism or {}

    def check(self, plan: ParallelContext) -> None:
        check_installed()
        if plan.device.type == "cpu":
            raise ValueError(
                "Accelerate makes FSDP of its FSDP plugin on GPUs and the like alone (state.py "
                "leaves MULTI_CPU out): on a CPU it would quietly train DDP; use strategy=fsdp"
            )

    # nothing yet: the executor hands the model to Accelerate, with its optimizer
    parallelize = Strategy.parallelize
    verify = Strategy.verify

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        (model,) = models.values()
        with accelerator_of(plan, 1, **self._settings(model, plan)) as accelerator:
            wrapped, steppers = prepare(accelerator, models, optimizers, FSDPModule)
        for module in wrapped.values():
            watch_units(module, [int(rank) for rank in plan.mesh[self.axis].mesh.flatten()])
            self._verify_shards(module)
        return AccelerateExecutor(accelerator, wrapped, steppers, micro_batches, plan)

    def _settings(self, model: nn.Module, plan: ParallelContext) -> dict[str, Any]:
        """Return what the Accelerator is given: its plugins."""
        from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

        kinds = sorted({type(block).__name__ for block in blocks_of(model)})
        plugin = {
            "fsdp_version": 2,
            "reshard_after_forward": self.reshard_after_forward,
            "cpu_ram_efficient_loading": False,
            "auto_wrap_policy": "transformer_based_wrap" if kinds else "no_wrap",
            "transformer_cls_names_to_wrap": kinds or None,
            "mixed_precision_policy": plan.precision.fsdp_policy(),
        }
        settings = {
            "fsdp_plugin": validated(
                "strategy.fsdp.plugin", FullyShardedDataParallelPlugin, plugin | self.plugin
            )
        }
        if self.parallelism:
            settings["parallelism_config"] = validated(
                "strategy.fsdp.parallelism", ParallelismConfig, self.parallelism
            )
        return settings

    def _verify_shards(self, model: nn.Module) -> None:
        """Asked = got: a rank keeps its rows of each weight only."""
        shards = self.degree if not self.parallelism else self.parallelism.get("dp_shard_size", 1)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            rows, most = local_part(parameter).shape[0], -(-parameter.shape[0] // shards)
            assert rows <= most, f"{name}: {rows} rows on this rank, not {most}"
