"""Local SGD by Hugging Face's Accelerate: each rank trains by itself; every H steps weights meet.

    H times:  w_r <- w_r - optimizer(g_r)     on every rank r, of its own rows: no message
    then:     w_r <- mean over the ranks of w_r

It is not a synchronous strategy: its losses are not one process's. Evaluations and checkpoints are
of the ranks' mean, of their moments too; a run that resumes begins there on every rank, so its
curve is not quite that of one run. Cost of H steps, per rank: one all-reduce for each weight,
2 (n-1)/n times their bytes on a ring, 1/H of ddp's. Sources: Stich 2019, "Local SGD" (1805.09767);
https://huggingface.co/docs/accelerate, release 1.15. `local_sgd` is dtrain's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, message
from dtrain.parallel.optimizer import named_tensors
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy, check_options
from dtrain.parallel.unused_parameters import with_zero_states
from dtrain.strategy.accelerate.ddp import AccelerateDDP
from dtrain.strategy.accelerate.library import AccelerateExecutor
from dtrain.task.batch import Batch, Sums

if TYPE_CHECKING:
    from dtrain.task.base import Update


class AccelerateLocalSGD(AccelerateDDP):
    """Accelerate's local SGD over `dp`. It stands alone.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
        sync_every: optimizer steps from one mean to the next, H.
    """

    name = "accelerate_local_sgd"
    synchronous = False
    no_followers = "accelerate_ddp"

    def __init__(self, degree: int = REST, sync_every: int = 8) -> None:
        super().__init__(degree)
        self.sync_every = sync_every
        check_options(self.axis, ("sync_every", sync_every, sync_every >= 1, "at least 1"))

    def run_by(self, *parts: Any) -> Executor:
        return AccelerateLocalSGDExecutor(self.sync_every, *parts)

    sync_gradients = Strategy.sync_gradients  # nothing: gradients never travel

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        if self.sync_every > 1:
            raise ValueError(
                f"local SGD's messages are of each {self.sync_every}th step, not of every step"
            )
        weights = [weight.elements for piece in footprint.pieces for weight in piece.weights]
        return [message(self.axis, "all_reduce", weights, footprint.weight_bytes)]


class AccelerateLocalSGDExecutor(AccelerateExecutor):
    """Steps of each rank by itself, and Accelerate's mean over the ranks after every H of them."""

    def __init__(self, sync_every: int, *parts: Any) -> None:
        from accelerate.local_sgd import LocalSGD

        super().__init__(*parts)
        self.averagers = {
            name: LocalSGD(self.accelerator, model, sync_every)
            for name, model in self.models.items()
        }
        for averager in self.averagers.values():
            averager.__enter__()  # for good: it would average once more as it leaves

    def norm(self, model: str) -> Tensor:
        """Return the root mean square of the ranks' norms: each has clipped by its own."""
        return self._mean(super().norm(model).double().square()).sqrt()

    def step(self, model: str, optimizer: Optimizer) -> None:
        super().step(model, optimizer)
        self.averagers[model].step()

    @torch.no_grad()
    def evaluate(self, update: Update, batch: Batch) -> Sums:
        parameters = list(self.models[update.trains].parameters())
        own = [parameter.data for parameter in parameters]
        self.averagers[update.trains]._sync_and_avg_model_params()
        try:
            return super().evaluate(update, batch)
        finally:
            for parameter, weight in zip(parameters, own, strict=True):
                parameter.data = weight

    def state_tensors(self, model: str) -> dict[str, Tensor]:
        """Return the ranks' mean of each."""
        whole, group = self.plan.unwrap(self.models[model]), self.plan.mesh["dp"].get_group()
        live = with_zero_states(self._live(model), whole, group)
        return {name: self._mean(tensor) for name, tensor in live.items()}

    @torch.no_grad()
    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self._live(model).items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def _live(self, model: str) -> dict[str, Tensor]:
        """Return the weights, buffers and states that this rank trains, by their full names."""
        return named_tensors(self.plan.unwrap(self.models[model]), self.optimizers[model].optimizer)

    def _mean(self, tensor: Tensor) -> Tensor:
        """Return a new tensor: the mean over the ranks. Collective: every rank calls it."""
        mean: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return mean
