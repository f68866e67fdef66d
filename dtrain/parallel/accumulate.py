"""Gradient accumulation: the plain way to run an update's forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.parallel.footprint import BACKWARD, FORWARD
from dtrain.parallel.spans import PHASE, mark
from dtrain.parallel.strategy import Executor, ParallelContext, full_tensor
from dtrain.task.base import Update
from dtrain.task.batch import Batch, Models, Sums, divide


class GradientAccumulation(Executor):
    """Run a rank's rows in equal micro-batches; gradients are exchanged with the last one only."""

    def __init__(self, models: Models, micro_batches: int, plan: ParallelContext) -> None:
        self.models, self.micro_batches, self.plan = models, micro_batches, plan

    def train(self, update: Update, batch: Batch, scale: Tensor) -> Tensor:
        total = torch.zeros((), device=self.plan.device, dtype=torch.float64)
        with self.plan.around(self.models if update.second_order else None):
            for index, part in enumerate(divide(batch, self.micro_batches), start=1):
                self.plan.sync_gradients(self.models, enabled=index == self.micro_batches)
                with self.plan.autocast(), mark(PHASE, FORWARD):
                    loss = full_tensor(update.loss(self.models, part)) * scale
                with mark(PHASE, BACKWARD):
                    self.backward(update, loss)
                total += loss.detach()
            self.plan.finish_backward(self.models)
        return total

    def backward(self, update: Update, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def evaluate(self, update: Update, batch: Batch) -> Sums:
        sums: Sums = {}
        for part in divide(batch, self.micro_batches):
            with self.plan.around(), self.plan.autocast():
                measured = update.measure(self.models, part)
            sums = {
                name: sums.get(name, 0) + full_tensor(value).double()
                for name, value in measured.items()
            }
        return sums
