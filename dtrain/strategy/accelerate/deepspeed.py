"""DeepSpeed's ZeRO, stages 1 to 3, by the DeepSpeed plugin of Hugging Face's Accelerate.

    model, optimizer -> Accelerator.prepare -> DeepSpeedEngine, as under deepspeed
    backward:  the last micro-batch's backward pass also clips and steps; no gradient is left

Cost a step, per rank: as deepspeed, on a ring 3 (n-1)/n times the bytes of the weights. Sources:
https://huggingface.co/docs/accelerate, release 1.15; Rajbhandari et al. 2020, "ZeRO" (1910.02054).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dtrain.parallel.footprint import Footprint
from dtrain.parallel.strategy import Executor, ParallelContext
from dtrain.strategy.accelerate.library import accelerator_of, check_installed, prepare
from dtrain.strategy.deepspeed.library import fresh_groups, imported
from dtrain.strategy.deepspeed.zero import DeepSpeed, DeepSpeedExecutor
from dtrain.task.batch import Models

if TYPE_CHECKING:
    from dtrain.task.base import Update


class AccelerateDeepSpeed(DeepSpeed):
    """DeepSpeed's ZeRO over `dp`, stages 1 to 3, by Accelerate's plugin. It stands alone.

    Args:
        degree, deepspeed: as DeepSpeed's.
    """

    name = "accelerate_deepspeed"
    engine = "accelerate"
    one_model = "accelerate_ddp"

    def check(self, plan: ParallelContext) -> None:
        check_installed()
        if find_spec("transformers") is None:
            raise ValueError(
                "Accelerate's DeepSpeed plugin needs the package transformers: pip install "
                "transformers"
            )
        super().check(plan)
        if not self.stage:
            raise ValueError(
                "strategy accelerate_deepspeed is for stages 1, 2 and 3: use accelerate_ddp "
                "for stage 0"
            )

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        deepspeed = imported()
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
        from deepspeed import DeepSpeedEngine

        fresh_groups(deepspeed, plan)

        # the plugin would look into it; `refuse_contradictions` has compared the settings
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=self.config(plan, micro_batches))
        backend = InitProcessGroupKwargs(backend=dist.get_backend())
        with accelerator_of(
            plan, micro_batches, deepspeed_plugin=plugin, kwargs_handlers=[backend]
        ) as accelerator:
            engines, _ = prepare(accelerator, models, optimizers, DeepSpeedEngine)
        plugin.dschf = None  # or transformers would make its next models as slices of ZeRO 3
        for engine in engines.values():
            self.verify_engine(engine, self.degree)
        return AccelerateDeepSpeedExecutor(
            accelerator, self.stage, engines, micro_batches, plan, models
        )

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        footprint = super().footprint(footprint, plan)
        held = footprint.held  # weights, gradients, states; gradients end in the backward pass
        return replace(footprint, held=held and (held[0], 0, held[2]))


class AccelerateDeepSpeedExecutor(DeepSpeedExecutor):
    """Micro-batches through an engine that clips and steps in the last one's backward pass."""

    def __init__(self, accelerator: Any, *parts: Any) -> None:
        super().__init__(*parts)
        self.accelerator = accelerator

    def backward(self, update: Update, loss: Tensor) -> None:
        self.refuse_unused(update, loss)
        with self.accelerator.accumulate(self.engines[update.trains]):
            self.accelerator.backward(loss * self.micro_batches)  # by which the engine divides

    def norm(self, model: str) -> Tensor | None:
        return torch.as_tensor(self.engines[model].get_global_grad_norm(), dtype=torch.float64)

    def step(self, model: str, optimizer: Optimizer) -> None:
        """The engine has stepped."""
