"""Hugging Face's Accelerate in the place of our own wrappers: its `Accelerator` prepares models and
optimizers.

    accelerate_ddp        DistributedDataParallel, as it makes it
    accelerate_local_sgd  no gradient travels; every `sync_every` steps the weights are averaged
    accelerate_fsdp       fully_shard, by its FSDP2 plugin; GPUs only: a CPU would quietly train DDP
    accelerate_deepspeed  DeepSpeed's engine, by its DeepSpeed plugin

What `accelerate launch` and its configuration file say reaches a process by its environment
(`library.py`). Costs a step are those of `ddp`, `fsdp` and `deepspeed`. Source:
https://huggingface.co/docs/accelerate, release 1.15; local SGD: Stich 2019 (1805.09767).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dtrain.model.layout import blocks_of
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import REST, Executor, local_part
from dtrain.parallel.units import watch_units
from dtrain.strategy.accelerate.library import (
    AccelerateExecutor,
    AccelerateLocalSGDExecutor,
    accelerator_of,
    check_installed,
    prepare,
    validated,
)
from dtrain.strategy.ddp import DDP
from dtrain.strategy.deepspeed.library import fresh_groups, imported
from dtrain.strategy.deepspeed.zero import DeepSpeed, DeepSpeedExecutor
from dtrain.strategy.fsdp import FSDP
from dtrain.task.batch import Models

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan
    from dtrain.task.base import Update


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
        # torch's default, which Accelerate does not pass on: then the first is of 1 MiB
        if bucket_mb == 25.0:
            self.first_bucket_mb = 1.0
        self.settings = {"bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": True} | (ddp or {})

    def check(self, plan: Plan) -> None:
        super().check(plan)
        check_installed()
        if plan.world_size < 2:
            raise ValueError(
                "Accelerate wraps nothing on one rank: use strategy=single, or 2 or more ranks"
            )
        from accelerate.utils import DistributedDataParallelKwargs

        validated("strategy.dp.ddp", DistributedDataParallelKwargs, self.settings)

    def parallelize(self, model: nn.Module, plan: Plan) -> nn.Module:
        return model  # the executor hands it to Accelerate, with its optimizer

    def verify(self, model: nn.Module, plan: Plan) -> None:
        """Nothing yet: see `library.prepare`."""

    def executor(
        self, models: Models, optimizers: Mapping[str, Optimizer], plan: Plan, micro_batches: int
    ) -> Executor:
        from accelerate.utils import DistributedDataParallelKwargs

        for model in models.values():
            self.watch(model)
        with accelerator_of(
            plan, 1, kwargs_handlers=[DistributedDataParallelKwargs(**self.settings)]
        ) as accelerator:
            wrapped, steppers = prepare(accelerator, models, optimizers, DistributedDataParallel)
        return self.by(accelerator, models | wrapped, steppers, micro_batches, plan)

    def by(self, *parts: Any) -> Executor:
        return AccelerateExecutor(*parts)

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        # a model that only follows another is not wrapped
        if isinstance(model, DistributedDataParallel):
            super().sync_gradients(model, enabled)

    def cost(self, footprint: Footprint, plan: Plan) -> list[Message]:
        if self.settings.keys() - {"bucket_cap_mb", "gradient_as_bucket_view"}:
            raise ValueError(f"DDP's messages are not known with ddp={self.settings}")
        return super().cost(footprint, plan)


class AccelerateLocalSGD(AccelerateDDP):
    """Accelerate's local SGD over `dp`: not a synchronous strategy. It stands alone.

    Each rank trains by itself. Evaluations and checkpoints are of the average of the ranks'
    weights, and of their moments: a run that resumes begins from those on every rank, so its curve
    is not quite that of one run.

    Args:
        degree, bucket_mb: as above.
        sync_every: optimizer steps from one average to the next.
    """

    name = "accelerate_local_sgd"
    synchronous = False
    no_followers = "accelerate_ddp"

    def __init__(self, degree: int = REST, sync_every: int = 8) -> None:
        super().__init__(degree)
        self.sync_every = sync_every
        if sync_every < 1:
            raise ValueError(f"strategy.dp.sync_every={sync_every} must be at least 1")

    def by(self, *parts: Any) -> Executor:
        return AccelerateLocalSGDExecutor(self.sync_every, *parts)

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        """Never."""

    def cost(self, footprint: Footprint, plan: Plan) -> list[Message]:
        if self.sync_every > 1:
            raise ValueError(
                f"local SGD's messages are of each {self.sync_every}th step, not of every step"
            )
        weights = [weight.elements for piece in footprint.pieces for weight in piece.weights]
        return [message(self.axis, "all_reduce", weights, footprint.weight_bytes)]


class AccelerateFSDP(FSDP):
    """Accelerate's FSDP2 over `fsdp`: a unit for each block, one for the last norm, one for all the
    rest.

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

    def check(self, plan: Plan) -> None:
        check_installed()
        if plan.device.type == "cpu":
            raise ValueError(
                "Accelerate makes FSDP of its FSDP plugin on GPUs and the like alone "
                "(state.py leaves "
                "MULTI_CPU out): on a CPU it would quietly train DDP; use strategy=fsdp"
            )

    def parallelize(self, model: nn.Module, plan: Plan) -> nn.Module:
        return model

    def verify(self, model: nn.Module, plan: Plan) -> None:
        """Nothing yet: see `executor`."""

    def executor(
        self, models: Models, optimizers: Mapping[str, Optimizer], plan: Plan, micro_batches: int
    ) -> Executor:
        from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

        (model,) = models.values()
        kinds = sorted({type(block).__name__ for block in blocks_of(model)})
        settings: dict[str, Any] = {
            "fsdp_plugin": validated(
                "strategy.fsdp.plugin",
                FullyShardedDataParallelPlugin,
                {
                    "fsdp_version": 2,
                    "reshard_after_forward": self.reshard_after_forward,
                    "cpu_ram_efficient_loading": False,
                    "auto_wrap_policy": "transformer_based_wrap" if kinds else "no_wrap",
                    "transformer_cls_names_to_wrap": kinds or None,
                    "mixed_precision_policy": plan.precision.fsdp_policy(),
                }
                | self.plugin,
            )
        }
        if self.parallelism:
            settings["parallelism_config"] = validated(
                "strategy.fsdp.parallelism", ParallelismConfig, self.parallelism
            )
        with accelerator_of(plan, 1, **settings) as accelerator:
            wrapped, steppers = prepare(accelerator, models, optimizers, FSDPModule)
        for each in wrapped.values():
            watch_units(each, [int(rank) for rank in plan.mesh[self.axis].mesh.flatten()])
        shards = self.degree if not self.parallelism else self.parallelism.get("dp_shard_size", 1)
        for name, parameter in next(iter(wrapped.values())).named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            most = -(-parameter.shape[0] // shards)
            assert local_part(parameter).shape[0] <= most, (
                f"{name}: {local_part(parameter).shape[0]} rows here, not {most}"
            )
        return AccelerateExecutor(accelerator, wrapped, steppers, micro_batches, plan)


class AccelerateDeepSpeed(DeepSpeed):
    """DeepSpeed's ZeRO over `dp`, stages 1 to 3, by Accelerate's DeepSpeed plugin. It stands alone.

    Args:
        degree, deepspeed: as DeepSpeed's.
    """

    name = "accelerate_deepspeed"
    engine = "accelerate"
    one_model = "accelerate_ddp"

    def check(self, plan: Plan) -> None:
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

    def footprint(self, footprint: Footprint, plan: Plan) -> Footprint:
        made = super().footprint(footprint, plan)
        # a gradient ends in the backward pass
        return replace(made, held=made.held and (made.held[0], 0, made.held[2]))

    def executor(
        self, models: Models, optimizers: Mapping[str, Optimizer], plan: Plan, micro_batches: int
    ) -> Executor:
        deepspeed = imported()
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
        from deepspeed import DeepSpeedEngine

        fresh_groups(deepspeed, plan)

        # what they say is what we say: it has been compared
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=self.config(plan, micro_batches))
        backend = InitProcessGroupKwargs(backend=dist.get_backend())
        with accelerator_of(
            plan, micro_batches, deepspeed_plugin=plugin, kwargs_handlers=[backend]
        ) as accelerator:
            engines, _ = prepare(accelerator, models, optimizers, DeepSpeedEngine)
        plugin.dschf = None  # by which transformers would make its next models as slices of ZeRO 3
        for engine in engines.values():
            self.verify_engine(engine, self.degree)
        return AccelerateDeepSpeedExecutor(
            accelerator, self.stage, engines, micro_batches, plan, models
        )


class AccelerateDeepSpeedExecutor(DeepSpeedExecutor):
    """A DeepSpeed engine that clips and steps at the end of the last micro-batch's backward
    pass.
    """

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
        """It has."""
