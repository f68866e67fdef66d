"""Distributed data parallel as Hugging Face's Accelerate makes it: its `Accelerator` wraps models.

    model, optimizer -> Accelerator.prepare -> DistributedDataParallel, AcceleratedOptimizer
    backward:  by the Accelerator; gradients travel in buckets, as under ddp
    step:      the Accelerator clips by the whole gradient's norm

Cost a step, per rank: as ddp, one all-reduce of all gradients, 2 (n-1)/n times their bytes on a
ring. Source: https://huggingface.co/docs/accelerate, release 1.15; Li et al. 2020, "PyTorch
Distributed" (2006.15704).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy
from dtrain.strategy.accelerate.library import (
    AccelerateExecutor,
    accelerator_of,
    check_installed,
    prepare,
    validated,
)
from dtrain.strategy.ddp import DDP
from dtrain.task.batch import Models


class AccelerateDDP(DDP):
    """Accelerate's DDP over `dp`. It stands alone.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
        bucket_mb: gradients are sent together in buckets of this size, in MiB.
        ddp: further settings of Accelerate's `DistributedDataParallelKwargs`.
    """

    name = "accelerate_ddp"

    def __init__(
        self, degree: int = REST, bucket_mb: float = 25.0, ddp: dict[str, Any] | None = None
    ) -> None:
        super().__init__(degree, bucket_mb)
        # Accelerate does not pass torch's default on: then the first bucket has 1 MiB
        if bucket_mb == 25.0:
            self.first_bucket_mb = 1.0
        self.settings = {"bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": True} | (ddp or {})

    def check(self, plan: ParallelContext) -> None:
        super().check(plan)
        check_installed()
        if plan.world_size < 2:
            raise ValueError(
                "Accelerate wraps nothing on one rank: use strategy=single, or 2 or more ranks"
            )
        from accelerate.utils import DistributedDataParallelKwargs

        validated("strategy.dp.ddp", DistributedDataParallelKwargs, self.settings)

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
        from accelerate.utils import DistributedDataParallelKwargs

        for model in models.values():
            self.watch(model)
        handlers = [DistributedDataParallelKwargs(**self.settings)]
        with accelerator_of(plan, 1, kwargs_handlers=handlers) as accelerator:
            wrapped, steppers = prepare(accelerator, models, optimizers, DistributedDataParallel)
        return self.run_by(accelerator, models | wrapped, steppers, micro_batches, plan)

    def run_by(self, *parts: Any) -> Executor:
        """Return the executor of these parts: see `AccelerateExecutor`."""
        return AccelerateExecutor(*parts)

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        # a model that only follows another is not wrapped
        if isinstance(model, DistributedDataParallel):
            super().sync_gradients(model, enabled)

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        if self.settings.keys() - {"bucket_cap_mb", "gradient_as_bucket_view"}:
            raise ValueError(f"DDP's messages are not known with ddp={self.settings}")
        return super().cost(footprint, plan)
