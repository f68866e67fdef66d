"""The weights that one server keeps, as it and its workers hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtrain.strategy.parameter_server.gradient_compression import GradientCompression
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.zero1 import equal_shares
from dtrain.task.base import Task
from dtrain.task.batch import Models


class Share:
    """Some weights of the models that are trained, in the order in which they travel."""

    def __init__(self, parameters: list[nn.Parameter], trained: Models) -> None:
        self.parameters = parameters
        self.by_model: dict[str, list[nn.Parameter]] = {}
        for name, model in trained.items():
            own = {id(p) for p in model.parameters()}
            self.by_model[name] = [p for p in parameters if id(p) in own]

    def flat(self) -> Tensor:
        """Return a copy of all weights in one tensor."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def empty(self) -> Tensor:
        """Return a tensor of the size and the format of `flat`."""
        size = sum(p.numel() for p in self.parameters)
        return torch.empty(size, dtype=self.parameters[0].dtype)

    def load(self, flat: Tensor) -> None:
        """Set all weights to what `flat` has returned in another process."""
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(flat, sizes), strict=True):
            parameter.data.copy_(part.view_as(parameter))

    def compressions(self, strategy: ParameterServer) -> dict[str, GradientCompression]:
        """Return how each model's gradients travel."""
        return {
            name: GradientCompression(
                strategy.compression,
                [p.shape for p in parameters],
                parameters[0].dtype if parameters else torch.float32,
                share=strategy.top_k_fraction,
                rank=strategy.power_sgd_rank,
            )
            for name, parameters in self.by_model.items()
        }


def shares_of(task: Task, models: Models, servers: int) -> list[Share]:
    """Return the shares of all servers, of about equal sizes; the same in every process."""
    trained = {update.trains: models[update.trains] for update in task.updates}
    parameters = [p for model in trained.values() for p in model.parameters()]
    return [Share(share, trained) for share in equal_shares(parameters, servers)]
