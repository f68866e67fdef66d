"""ZeRO by DeepSpeed's own engine: it takes over the backward pass, the gradients and the optimizer.

    stage 0   as ddp: all-reduce of the gradients
    stage 1   each rank keeps the fp32 weights and optimizer states of one slice of all weights
    stage 2   and of the gradients its slice only
    stage 3   and of the weights: gathered for a module's forward and backward pass, then freed

    backward:  gradients fill a bucket; when it is full it is summed over the ranks
    step:      each rank steps its slice; stages 1 and 2 then all-gather the weights

`deepspeed` is DeepSpeed's own configuration, every key of it: offload, buckets, overlap,
quantisation. What the run sets already (sizes of a batch, clipping, the optimizer) is refused
there. Cost a step, per rank, on a ring: 2 (n-1)/n times the weights' bytes at stage 0, 3 (n-1)/n
from stage 1 on; stages 2 and 3 sum gradients, and stage 3 gathers weights, in every micro-batch.
To the byte: `traffic.py`. Sources: Rajbhandari et al. 2020, "ZeRO" (1910.02054); Ren et al. 2021,
"ZeRO-Offload" (2101.06840).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.model.layout import attributes_set
from dtrain.parallel.accumulate import GradientAccumulation
from dtrain.parallel.checks.optimizer import FLAT
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy
from dtrain.parallel.unused_parameters import reached_parameters, refuse_unused
from dtrain.strategy.deepspeed.autotp import AutoTP
from dtrain.strategy.deepspeed.engine_state import (
    distribute_states,
    flat_slices,
    full_size,
    materialize_states,
    tensors_by_kind,
    whole_tensors,
)
from dtrain.strategy.deepspeed.library import (
    ENGINE,
    check_fp16,
    check_zero,
    fresh_groups,
    imported,
    sequences,
)
from dtrain.strategy.deepspeed.traffic import bytes_held, messages
from dtrain.task.batch import Models

if TYPE_CHECKING:
    from dtrain.task.base import Task, Update

FP16 = "strategy.dp.deepspeed.fp16.enabled=true"
PADDING = 8  # elements at most that DeepSpeed adds to a slice
OWNED = {  # keys of DeepSpeed's configuration that the run has a setting of its own for
    "train_batch_size": "global_batch_size", "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size", "gradient_clipping": "clip_norm",
    "optimizer": "optimizer", "scheduler": "lr_schedule", "bf16": "dtype=bf16",
    "torch_autocast": "dtype=bf16", "prescale_gradients": "nothing: losses are scaled",
    "gradient_predivide_factor": "nothing: losses are scaled",
}  # fmt: skip


class DeepSpeed(Strategy):
    """DeepSpeed's ZeRO over `dp`. It stands alone, but for DeepSpeed's other strategies.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
        deepspeed: DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/), as nested
            keys.
    """

    name = "deepspeed"
    axis = "dp"
    engine = ENGINE
    stands_alone = ", not beside {others}: use fsdp or zero1 there"

    def __init__(self, degree: int = REST, deepspeed: dict[str, Any] | None = None) -> None:
        super().__init__(degree)
        self.settings = deepspeed or {}
        self.zero: dict[str, Any] = self.settings.get("zero_optimization") or {}
        self.stage = self.zero.get("stage", 0)
        self.stepped = (FLAT,) if self.stage else ()
        self.fp16 = bool((self.settings.get("fp16") or {}).get("enabled"))
        for key in OWNED.keys() & self.settings.keys():
            raise ValueError(
                f"strategy.dp.deepspeed.{key}={self.settings[key]} is for the run to say: use "
                f"{OWNED[key]}"
            )
        where = "strategy.dp.deepspeed.zero_optimization"
        if self.zero.get("round_robin_gradients"):  # _hp_mapping then names the wrong weights
            raise ValueError(
                f"{where}.round_robin_gradients=true: DeepSpeed 0.19 loses count of its slices; "
                f"use false"
            )
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"{where}.stage={self.stage} must be 0, 1, 2 or 3")

    def check(self, plan: ParallelContext) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError(
                f"strategy {self.name} needs the package deepspeed: pip install 'dtrain[deepspeed]'"
            )
        self.casts_itself = plan.precision.mixed
        if plan.precision.weights_dtype != torch.float32:
            raise ValueError(
                f"strategy {self.name} keeps its weights in fp32, dtype={plan.precision.compute} "
                f"does not: use fp32 or bf16"
            )
        if _autotp(plan) and not self.stage:
            raise ValueError(
                "strategy deepspeed_autotp is for stages 1, 2 and 3: use strategy=tensor "
                "for stage 0"
            )
        if self.casts_itself and not self.stage:
            raise ValueError(
                "DeepSpeed's stage 0 keeps no weights in fp32 beside dtype=bf16: use stage 1, "
                "2 or 3"
            )
        if plan.precision.reduce:
            raise ValueError(
                f"precision.reduce={plan.precision.reduce} is not for strategy {self.name}: set "
                f"strategy.dp.deepspeed.communication_data_type"
            )
        if plan.compile:
            raise ValueError(
                "compile=true compiles blocks before DeepSpeed hooks into them: use compile=false"
            )
        check_zero(self.zero)
        if self.fp16:
            self._check_fp16(plan)

    def _check_fp16(self, plan: ParallelContext) -> None:
        if plan.precision.mixed or not self.stage or len(plan.strategies) > 1:
            raise ValueError(
                f"{FP16} is for dtype=fp32 and stage 1, 2 or 3 alone, not "
                f"dtype={plan.precision.compute}, stage {self.stage}, {len(plan.strategies)} axes: "
                f"use dtype=bf16 there"
            )
        check_fp16(FP16)

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if any(update.second_order for update in task.updates):
            raise ValueError(
                f"a loss of task {type(task).__name__} holds gradients, and DeepSpeed takes every "
                f"backward pass for the step's: use another loss, or strategy=zero1"
            )
        # stage 0 lets no other engine call backward; 2 and 3 reduce at once
        if self.stage != 1 and len({update.trains for update in task.updates}) > 1:
            raise ValueError(
                f"task {type(task).__name__} trains {len(task.models)} models, and DeepSpeed's "
                f"stage {self.stage} takes every gradient for its own model's: use stage 1"
            )

    def optimizer(self, optimizer: Optimizer, model: nn.Module, plan: ParallelContext) -> Optimizer:
        """Return DeepSpeed's compiled AdamW for states in host memory, or torch's without it."""
        self.refuse_written(optimizer, model)
        device = (self.zero.get("offload_optimizer") or {}).get("device", "none")
        if device == "none" or not isinstance(optimizer, torch.optim.AdamW):
            return optimizer
        imported()
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            groups = [
                {key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")}
                for group in optimizer.param_groups
            ]
            compiled: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True)
            return compiled
        except Exception as error:  # a compiler may fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            logging.getLogger("dtrain").warning(
                "DeepSpeed's CPU Adam cannot be built, torch's steps: %s", reason
            )
            self.settings = self.settings | {"zero_force_ds_cpu_optimizer": False}
            return optimizer

    def refuse_written(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Raise ValueError for attributes of parameters that a user's optimizer may read.

        From stage 1 on it gets flat slices of many parameters, without them.
        """
        if not self.stage or type(optimizer).__module__.split(".")[0] == "torch":
            return
        for name, attributes in attributes_set(model).items():
            for key in (k for k in attributes if not k.startswith(("ds_", "_hf_", "_is_hf_"))):
                raise ValueError(
                    f"{name}.{key} is written on a parameter, and {type(optimizer).__name__} may "
                    f"read it: strategy {self.name} gives it flat slices; use strategy=fsdp or "
                    f"zero1"
                )

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        deepspeed, tensor = imported(), _autotp(plan)
        fresh_groups(deepspeed, plan)
        config, engines = self.config(plan, micro_batches), {}
        for name, optimizer in optimizers.items():
            model = models[name]
            shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
            more = {"tensor_parallel": tensor.settings(model)} if tensor else {}
            engines[name], *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config | more, mpu=sequences(plan)
            )
            self.verify_engine(engines[name], self.degree * plan.degrees.get("cp", 1))
            if tensor:
                tensor.verify_engine(model, shapes)
        executor = DeepSpeedExecutor(self.stage, engines, micro_batches, plan, models)
        executor.skips_nonfinite_steps = self.fp16
        return executor

    def config(self, plan: ParallelContext, micro_batches: int) -> dict[str, Any]:
        """Return DeepSpeed's configuration, with what the run says."""
        clipping = (plan.clip_norm or 0.0) if self.stage else 0.0  # at stage 0 the loop clips
        return self.settings | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": clipping,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
            "sequence_parallel_size": plan.degrees.get("cp", 1),
            **({"bf16": {"enabled": True}} if plan.precision.mixed else {}),
        }

    def verify_engine(self, engine: Any, ranks: int) -> None:
        """Asked = got: the stage, and that a rank keeps its share only."""
        stage = engine.zero_optimization_stage()
        assert stage == self.stage, f"stage {stage}, not {self.stage}"
        seen = engine.seq_dp_world_size if ranks != self.degree else engine.dp_world_size
        assert seen == ranks, f"DeepSpeed sees {seen} ranks, not {ranks}"
        if self.stage:
            kept = sum(flat.numel() for flat in flat_slices(engine))
            every = sum(map(full_size, engine.module.parameters()))
            most = -(-every // ranks) + PADDING * ranks * len(list(engine.module.parameters()))
            assert kept <= most, f"{kept} fp32 weights on this rank, of {every} on {ranks}"

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        # a model that follows another has no engine
        if set_boundary := getattr(model, "set_gradient_accumulation_boundary", None):
            set_boundary(enabled)

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        if not self.stage or len(footprint.pieces) > 1:
            return footprint
        if self.fp16:
            footprint = replace(footprint, compute_bytes=2)
        return replace(footprint, held=bytes_held(footprint, self.degree, self.stage))

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        if self.fp16:
            raise ValueError(
                "DeepSpeed's messages are not told with fp16, which asks for steps to be left out"
            )
        return messages(footprint, self.axis, self.degree, self.zero)


class DeepSpeedExecutor(GradientAccumulation):
    """Micro-batches through DeepSpeed's engines, which exchange gradients, clip and step.

    What is not trained has no engine, and stays as it is in `models`.
    """

    leaves_gradients = False

    def __init__(
        self,
        stage: int,
        engines: dict[str, Any],
        micro_batches: int,
        plan: ParallelContext,
        models: Models,
    ) -> None:
        super().__init__(models | engines, micro_batches, plan)
        self.stage, self.engines = stage, engines

    def backward(self, update: Update, loss: Tensor) -> None:
        self.refuse_unused(update, loss)
        # where cp cuts sequences, stages 0 to 2 average over the ranks of dp only
        parts = self.plan.degrees.get("cp", 1) if self.stage < 3 else 1
        self.engines[update.trains].backward(loss / parts, scale_wrt_gas=False)

    def refuse_unused(self, update: Update, loss: Tensor) -> None:
        module = self.engines[update.trains].module
        refuse_unused(module, reached_parameters(loss), self.plan, "DeepSpeed")

    def norm(self, model: str) -> Tensor | None:
        if not self.stage:
            return None  # gradients are in `.grad`, and the loop clips
        zero = self.engines[model].optimizer
        if self.stage < 3:
            norm: Tensor = zero.scaled_global_norm().double()
        else:
            norms = torch.stack(zero._get_norm_groups()).double()  # -1 where one is not finite
            norm = norms.where(norms >= 0, math.inf).norm()
        return norm / float(zero.loss_scale)

    def step(self, model: str, optimizer: Optimizer) -> None:
        self.engines[model].step()

    def make_states(self, model: str, optimizer: Optimizer) -> None:
        if self._keeps(model):
            materialize_states(self.engines[model])
        else:
            super().make_states(model, optimizer)

    def state_tensors(self, model: str) -> dict[str, Tensor] | None:
        if not self._keeps(model):
            return None
        engine, autotp = self.engines[model], _autotp(self.plan)
        tensors = whole_tensors(engine)
        return autotp.joined(engine.module, tensors, self.plan) if autotp else tensors

    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:
        if self._keeps(model):
            engine, autotp = self.engines[model], _autotp(self.plan)
            own = autotp.parted(engine.module, tensors, self.plan) if autotp else tensors
            distribute_states(engine, own)

    def tensors_by_kind(self, model: str) -> dict[str, list[Tensor]] | None:
        return tensors_by_kind(self.engines[model]) if self._keeps(model) else None

    def _keeps(self, model: str) -> bool:
        """Return whether an engine keeps the model's weights and states."""
        return self.stage > 0 and model in self.engines


def _autotp(plan: ParallelContext) -> AutoTP | None:
    return next((strategy for strategy in plan.strategies if isinstance(strategy, AutoTP)), None)
