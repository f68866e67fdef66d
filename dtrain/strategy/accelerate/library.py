"""Accelerate's `Accelerator` under our loop, and what `accelerate launch` may have asked of
this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dtrain.model.layout import attributes_set, set_attributes
from dtrain.parallel.accumulate import GradientAccumulation
from dtrain.parallel.optimizer import named_tensors
from dtrain.parallel.strategy import ParallelContext
from dtrain.parallel.unused_parameters import with_zero_states
from dtrain.task.batch import Batch, Models, Sums

if TYPE_CHECKING:
    from dtrain.task.base import Update

LAUNCHED = {  # what `accelerate launch` sets, and the strategy that it is
    "ACCELERATE_USE_FSDP": "AccelerateFSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "AccelerateFSDP",
    "ACCELERATE_USE_DEEPSPEED": "AccelerateDeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "none of ours",
}


class AccelerateExecutor(GradientAccumulation):
    """Micro-batches through the models and optimizers that an Accelerator has prepared."""

    def __init__(
        self,
        accelerator: Any,
        models: Models,
        optimizers: dict[str, Any],
        micro_batches: int,
        plan: ParallelContext,
    ) -> None:
        super().__init__(models, micro_batches, plan)
        self.accelerator, self.optimizers = accelerator, optimizers

    def backward(self, update: Update, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def norm(self, model: str) -> Tensor | None:
        most = self.plan.clip_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.models[model].parameters(), most)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, model: str, optimizer: Optimizer) -> None:
        self.optimizers[model].step()


class AccelerateLocalSGDExecutor(AccelerateExecutor):
    """Each rank by itself; see `AccelerateLocalSGD`."""

    def __init__(self, every: int, *parts: Any) -> None:
        from accelerate.local_sgd import LocalSGD

        super().__init__(*parts)
        self.alone = {
            name: LocalSGD(self.accelerator, model, every) for name, model in self.models.items()
        }
        with ExitStack() as stack:
            for each in self.alone.values():
                stack.enter_context(each)
            stack.pop_all()  # for good: it would average once more as it leaves

    def norm(self, model: str) -> Tensor:
        """Root mean square of the ranks' norms: each has clipped by its own."""
        square = super().norm(model).double().square()  # type: ignore[union-attr]
        return self.accelerator.reduce(square, reduction="mean").sqrt()

    def step(self, model: str, optimizer: Optimizer) -> None:
        super().step(model, optimizer)
        self.alone[model].step()

    @torch.no_grad()
    def evaluate(self, update: Update, batch: Batch) -> Sums:
        own = {
            name: parameter.data
            for name, parameter in self.models[update.trains].named_parameters()
        }
        self.alone[update.trains]._sync_and_avg_model_params()
        try:
            return super().evaluate(update, batch)
        finally:
            for name, parameter in self.models[update.trains].named_parameters():
                parameter.data = own[name]

    def state_tensors(self, model: str) -> dict[str, Tensor]:
        live = with_zero_states(self._live(model), self.models[model].module, dist.group.WORLD)  # type: ignore[arg-type]
        return {
            name: self.accelerator.reduce(t.clone(), reduction="mean") for name, t in live.items()
        }

    @torch.no_grad()
    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self._live(model).items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def _live(self, model: str) -> dict[str, Tensor]:
        optimizer = self.optimizers[model].optimizer
        return named_tensors(self.models[model].module, optimizer)  # type: ignore[arg-type]


@contextmanager
def accelerator_of(plan: ParallelContext, micro_batches: int, **settings: Any) -> Iterator[Any]:
    """A fresh Accelerator on the process group that is there; what it changes of the process is put
    back.

    Raises:
        RuntimeError: it does not see the ranks that there are, and would train each apart.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    # all of them are of the process, and there may have been another run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    before, threads = dict(os.environ), torch.get_num_threads()
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    asked = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": str(plan.device.index or rank),
        "LOCAL_WORLD_SIZE": size,
    }
    # DeepSpeed goes on to ask
    before |= {key: value for key, value in asked.items() if key not in before}
    os.environ |= before
    steps = GradientAccumulationPlugin(
        num_steps=micro_batches, adjust_scheduler=False, sync_with_dataloader=False
    )
    # with cpu=True a plugin would be left out
    cpu = plan.device.type == "cpu" and "deepspeed_plugin" not in settings
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",
            device_placement=False,
            dynamo_backend="no",
            gradient_accumulation_plugin=steps,
            **settings,
        )
        torch.set_num_threads(threads)
        if (accelerator.num_processes, accelerator.process_index) != (
            dist.get_world_size(),
            dist.get_rank(),
        ):
            raise RuntimeError(
                f"Accelerate sees rank {accelerator.process_index} of {accelerator.num_processes}"
            )
        yield accelerator
    finally:
        os.environ.clear()
        os.environ |= before


def prepare(
    accelerator: Any, models: Models, optimizers: Mapping[str, Optimizer], kind: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models and optimizers as Accelerate makes them ready; asserts that the models became what
    was asked for.
    """
    attributes = {name: attributes_set(model) for name, model in models.items()}
    made = {
        name: accelerator.prepare(model, optimizers[name])
        for name, model in models.items()
        if name in optimizers
    }
    for name, (model, _) in made.items():
        assert isinstance(model, kind), (
            f"{kind.__name__} was asked for, {name} is a {type(model).__name__}"
        )
        set_attributes(accelerator.unwrap_model(model), attributes[name])
    return {name: model for name, (model, _) in made.items()}, {
        name: optimizer for name, (_, optimizer) in made.items()
    }


def check_installed() -> None:
    """Raise ValueError if Accelerate is not there."""
    if find_spec("accelerate") is None:
        raise ValueError(
            "this strategy needs the package accelerate: pip install 'dtrain[accelerate]'"
        )


def validated(where: str, kind: type, settings: dict[str, Any]) -> Any:
    """`kind` of these settings; what it finds wrong with them in one line."""
    try:
        return kind(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}={settings}: {str(error).splitlines()[0]}") from None


def refuse_contradictions(plan: ParallelContext, micro_batches: int) -> None:
    """What `accelerate launch` and its configuration file say, if they say it, must be what the run
    does.

    Raises:
        ValueError: it is not; names both.
    """
    says = {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
    kinds = [type(strategy).__name__ for strategy in plan.strategies]
    if (
        says.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and "MASTER_PORT" in os.environ
        and "RANK" not in os.environ
    ):
        raise ValueError(
            "accelerate launch --cpu has started one process alone: use ACCELERATE_USE_CPU=true "
            "accelerate launch --multi_gpu --num_processes N, or torchrun"
        )
    for key, kind in LAUNCHED.items():
        if says.get(key, "").lower() == "true" and kind not in kinds:
            raise ValueError(
                f"accelerate launch says {key}=true, which is {kind}, and the strategy is "
                f"{' with '.join(kinds) or 'single'}"
            )
    run: dict[str, tuple[object, str]]
    run = {
        "MIXED_PRECISION": (plan.precision.compute, "dtype"),
        "DYNAMO_BACKEND": ("no", "compile=true instead of it"),
    }
    if "AccelerateDeepSpeed" in kinds and says.get("ACCELERATE_USE_DEEPSPEED"):
        zero = next(s for s in plan.strategies if s.axis == "dp").zero  # type: ignore[attr-defined]
        run |= {
            f"DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE": (
                (zero.get(f"offload_{what}") or {}).get("device", "none"),
                f"strategy.dp.deepspeed.zero_optimization.offload_{what}",
            )
            for what in ("optimizer", "param")
        }
        run |= {
            "DEEPSPEED_ZERO_STAGE": (
                zero["stage"],
                "strategy.dp.deepspeed.zero_optimization.stage",
            ),
            "GRADIENT_ACCUMULATION_STEPS": (micro_batches, "micro_batch_size"),
            "GRADIENT_CLIPPING": (plan.clip_norm, "clip_norm"),
            "DEEPSPEED_CONFIG_FILE": ("none", "strategy.dp.deepspeed"),
        }
    for key, (ours, setting) in run.items():
        said = says.get(f"ACCELERATE_{key}", "").lower()
        unsaid = (
            ("", "no", "none", "1") if key == "GRADIENT_ACCUMULATION_STEPS" else ("", "no", "none")
        )
        if said not in unsaid and said != str(ours).lower() and not _same_number(said, ours):
            raise ValueError(
                f"accelerate launch says ACCELERATE_{key}={said}, the run {ours}: set {setting}"
            )


def _same_number(said: str, ours: object) -> bool:
    try:
        return float(said) == float(ours)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
