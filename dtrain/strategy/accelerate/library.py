"""Accelerate as a library: an `Accelerator` of a run's own, and the executor that trains by it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dtrain.model.layout import attributes_set, set_attributes
from dtrain.parallel.accumulate import GradientAccumulation
from dtrain.parallel.strategy import ParallelContext, full_tensor
from dtrain.task.batch import Models

if TYPE_CHECKING:
    from dtrain.task.base import Update


def check_installed() -> None:
    """Raise ValueError if Accelerate is not there."""
    if find_spec("accelerate") is None:
        raise ValueError(
            "this strategy needs the package accelerate: pip install 'dtrain[accelerate]'"
        )


def validated(where: str, kind: type, settings: dict[str, Any]) -> Any:
    """Return a `kind` of these settings; raise ValueError in one line for what it refuses."""
    try:
        return kind(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}={settings}: {str(error).splitlines()[0]}") from None


@contextmanager
def accelerator_of(plan: ParallelContext, micro_batches: int, **settings: Any) -> Iterator[Any]:
    """Yield a fresh Accelerator in the process group that is there; then restore the environment.

    Raises:
        RuntimeError: it sees other ranks than there are, and would train each by itself.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    # both belong to the process, which may have had another run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    threads, rank, size = torch.get_num_threads(), dist.get_rank(), dist.get_world_size()
    for name, number in (
        ("RANK", rank),
        ("WORLD_SIZE", size),
        ("LOCAL_RANK", plan.device.index or rank),
        ("LOCAL_WORLD_SIZE", size),
    ):
        os.environ.setdefault(name, str(number))  # for good: DeepSpeed asks for them later, too
    before = dict(os.environ)
    steps = GradientAccumulationPlugin(
        num_steps=micro_batches, adjust_scheduler=False, sync_with_dataloader=False
    )
    # with cpu=True it would leave out a DeepSpeed plugin
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
        seen = accelerator.process_index, accelerator.num_processes
        if seen != (rank, size):
            raise RuntimeError(f"Accelerate sees rank {seen[0]} of {seen[1]}")
        yield accelerator
    finally:
        os.environ.clear()
        os.environ |= before


def prepare(
    accelerator: Any, models: Models, optimizers: Mapping[str, Optimizer], kind: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the models that train and their optimizers, as Accelerate prepares them.

    Asked = got: each model has become a `kind`.
    """
    wrapped, steppers = {}, {}
    for name, optimizer in optimizers.items():
        attributes = attributes_set(models[name])
        model, steppers[name] = accelerator.prepare(models[name], optimizer)
        assert isinstance(model, kind), f"{name} is a {type(model).__name__}, not {kind.__name__}"
        set_attributes(accelerator.unwrap_model(model), attributes)
        wrapped[name] = model
    return wrapped, steppers


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

    def norm(self, model: str) -> Tensor:
        most = self.plan.clip_norm or float("inf")
        parameters = self.models[model].parameters()
        return full_tensor(self.accelerator.clip_grad_norm_(parameters, most))

    def step(self, model: str, optimizer: Optimizer) -> None:
        self.optimizers[model].step()
