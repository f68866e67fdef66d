"""A parameter server: workers push gradients and pull weights, and need not wait for each other.

    worker 1:  pull w(3) ... gradient ... push -> w(5) = w(4) - lr g(w(3))   staleness 1: one update
    worker 2:  pull w(2) .......... gradient .......... push -> w(6)         came between; here 3
    server:    applies each as it comes

`mode=sync` waits for the gradients of all parts of a batch, and is ddp. `bounded` lets no worker be
more than `max_staleness` gradients ahead of the slowest. `async` lets all run. The first `servers`
ranks hold the weights, in shares; the others compute. A worker's gradient is that of one part of a
global batch, 1/W of its rows. In `async` and `bounded` each gradient is an update of its own, so a
step (a global batch) has W updates.

Workers are processes that their ranks look after. If one dies, it is started again, and another one
computes its gradient. Cost a step, per rank: a worker sends its gradients (or what `compression`
leaves of them), a server sends the weights to each of the W workers, so the server's connection is
the bottleneck. Sources: Li et al. 2014, "Scaling Distributed Machine Learning with the Parameter
Server"; Dean et al. 2012, DistBelief; Ho et al. 2013, stale-synchronous parallel; Zhang et al.
2015, rates divided by staleness (1511.05950).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dtrain.model.layout import StepAware
from dtrain.parallel.checks.optimizer import APART
from dtrain.parallel.mesh import REST
from dtrain.parallel.strategy import ParallelContext, Strategy, check_options
from dtrain.strategy.parameter_server.gradient_compression import METHODS
from dtrain.strategy.parameter_server.work_queue import ASYNC, MODES, SYNC

if TYPE_CHECKING:
    from dtrain.task.base import Task


class ParameterServer(Strategy):
    """The first ranks along `dp` keep the weights, all others compute gradients. It stands alone.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
        mode: async, bounded or sync.
        max_staleness: gradients that a worker may be ahead of the slowest, in `bounded`.
        servers: ranks that share the weights.
        divide_by_staleness: divide the learning rate by a gradient's staleness if it is above 1.
        compression: of gradients on their way to the server: none, fp16, bf16, top_k or power_sgd.
        top_k_fraction: share of the elements that top_k sends.
        power_sgd_rank: of power_sgd's matrices.
        restarts: how often a worker that dies is started again.
    """

    name = "parameter_server"
    axis = "dp"
    engine = "parameter_server"
    asynchronous = True
    stands_alone = ", not beside {others}: leave them out, or use replicate in its place"

    def __init__(
        self,
        degree: int = REST,
        *,
        mode: str = ASYNC,
        max_staleness: int = 4,
        servers: int = 1,
        divide_by_staleness: bool = False,
        compression: str = "none",
        top_k_fraction: float = 0.01,
        power_sgd_rank: int = 2,
        restarts: int = 3,
    ) -> None:
        super().__init__(degree)
        self.stepped = (APART,) if servers > 1 else ()
        self.mode, self.bound, self.servers, self.restarts = mode, max_staleness, servers, restarts
        self.divides_by_staleness, self.compression = divide_by_staleness, compression
        self.top_k_fraction, self.power_sgd_rank = top_k_fraction, power_sgd_rank
        check_options(
            self.axis,
            ("mode", mode, mode in MODES, f"one of {', '.join(MODES)}"),
            ("compression", compression, compression in METHODS, f"one of {', '.join(METHODS)}"),
            ("max_staleness", max_staleness, max_staleness >= 0, "at least 0"),
            ("servers", servers, servers >= 1, "at least 1"),
            ("restarts", restarts, restarts >= 0, "at least 0"),
            ("top_k_fraction", top_k_fraction, 0 < top_k_fraction <= 1, "above 0, at most 1"),
            ("power_sgd_rank", power_sgd_rank, power_sgd_rank >= 1, "at least 1"),
        )

    @property
    def synchronous(self) -> bool:  # type: ignore[override]
        """Whether it is ddp: whole gradients, and all of them."""
        return self.mode == SYNC and self.compression == "none"

    @property
    def workers(self) -> int:
        return self.degree - self.servers

    @property
    def parts(self) -> int:
        return self.workers

    def check(self, plan: ParallelContext) -> None:
        if self.workers < 1:
            raise ValueError(
                f"strategy parameter_server has {self.degree} ranks for {self.servers} servers and "
                f"the workers: start {self.servers + 1} or more"
            )
        if plan.compile:
            raise ValueError(
                "strategy parameter_server does not compile its workers' models: use compile=false"
            )
        if self.compression == "power_sgd" and plan.precision.weights_dtype == torch.bfloat16:
            raise ValueError(
                "strategy.dp.compression=power_sgd orthogonalises, which no CPU does in bf16: keep "
                "weights in fp32 (precision=bf16_mixed)"
            )
        if plan.device.type != "cpu":
            raise ValueError(
                "strategy parameter_server sends by gloo, from host memory: use device=cpu"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        if self.servers > (number := len(list(model.parameters()))):
            raise ValueError(
                f"strategy.dp.servers={self.servers} are more than the model's {number} weights"
            )
        saved = model.state_dict().keys()
        if any(name in saved for name, _ in model.named_buffers()) or any(
            isinstance(module, StepAware) for module in model.modules()
        ):
            raise ValueError(
                f"{type(model).__name__} keeps more than weights from step to step (loads, power "
                f"iterations), which workers do not push: use ddp"
            )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if self.servers > 1 and task.followers:
            raise ValueError(
                f"task {type(task).__name__} has a model that follows another, whose weights are "
                f"on several servers: use strategy.dp.servers=1"
            )
