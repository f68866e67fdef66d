"""Local SGD, DiLoCo, federated averaging: ranks train alone and exchange weights every H steps.

    inner, H times:  w_r <- w_r - optimizer(g_r)                  on every rank r, of its own rows
    outer:           D = mean over the ranks of (w0 - w_r)        pseudo-gradient: the only message
                     v <- m v + D;  w0 <- w0 - lr (D + m v)       Nesterov (or plain) momentum
                     w_r <- w0

With lr 1 and m 0 the new w0 is the mean of the weights: local SGD, and federated averaging. DiLoCo
is inner AdamW, lr 0.7, m 0.9. `num_fragments` exchanges the weights in parts, at different steps.
With `sync_delay` ranks go on training while a message is under way; that many steps later each
mixes what has come with its own weights (streaming DiLoCo).

This is not a synchronous strategy: its losses are not one process's. A step's figures are means
over the ranks. Evaluations and checkpoints are of the mean of the ranks' weights. A run that
resumes begins there, with the mean of their moments, and without the messages that were under way.
Cost of H steps, per rank: one all-reduce of the weights, 2 (n-1)/n times their bytes on a ring: 1/H
of ddp's.
Memory, where the outer step is more than a mean: w0 and v, twice the weights. Sources: Stich 2019,
"Local SGD" (1805.09767); McMahan et al. 2016, federated averaging (1602.05629); Douillard et al.
2023, DiLoCo (2311.08105); Douillard et al. 2025, "Streaming DiLoCo" (2501.18512).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.parallel.accumulate import GradientAccumulation
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, message
from dtrain.parallel.optimizer import OPTIMIZER_STATE, named_tensors
from dtrain.parallel.strategy import (
    Executor,
    ParallelContext,
    Strategy,
    all_reduce_mean,
    check_options,
    local_part,
)
from dtrain.parallel.unused_parameters import with_zero_states
from dtrain.task.batch import Batch, Models, Sums

if TYPE_CHECKING:
    from dtrain.task.base import Update

# States of a parameter: w0, v, inner steps done.
START, VELOCITY, STEPS = "outer_start", "outer_velocity", "outer_steps"


class LocalSGD(Strategy):
    """Ranks along `dp` (or groups that share a model) train alone, but for the outer steps.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
        sync_every: inner steps from one exchange of a weight to the next, H.
        outer_lr, outer_momentum, nesterov: of the outer step; 1 and 0 take the mean.
        num_fragments: parts of the weights, exchanged at steps of their own, evenly spread over H.
        sync_delay: steps that ranks take while a message is under way; below H.
        keep_local: share of its own weights that a rank keeps when a delayed message has come.
    """

    name = "local_sgd"
    axis = "dp"
    synchronous = False
    no_followers = "ddp"

    def __init__(
        self,
        degree: int = REST,
        *,
        sync_every: int = 8,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        num_fragments: int = 1,
        sync_delay: int = 0,
        keep_local: float = 0.5,
    ) -> None:
        super().__init__(degree)
        self.sync_every, self.num_fragments = sync_every, num_fragments
        self.sync_delay, self.keep_local = sync_delay, keep_local
        self.outer_lr, self.outer_momentum, self.nesterov = outer_lr, outer_momentum, nesterov
        check_options(
            self.axis,
            ("sync_every", sync_every, sync_every >= 1, "at least 1"),
            ("outer_lr", outer_lr, outer_lr > 0, "above 0"),
            ("outer_momentum", outer_momentum, 0 <= outer_momentum < 1, "from 0 to below 1"),
            (
                "num_fragments",
                num_fragments,
                1 <= num_fragments <= sync_every,
                f"from 1 to sync_every={sync_every}",
            ),
            (
                "sync_delay",
                sync_delay,
                0 <= sync_delay < sync_every,
                f"from 0 to below sync_every={sync_every}",
            ),
            ("keep_local", keep_local, 0 <= keep_local < 1, "from 0 to below 1"),
        )

    @property
    def remembers(self) -> bool:
        """Whether the outer step needs more than the ranks' weights."""
        return self.outer_lr != 1 or self.outer_momentum > 0 or self.sync_delay > 0

    def check(self, plan: ParallelContext) -> None:
        if plan.strategy_on("pp"):
            raise ValueError(
                "strategy local_sgd has a step of its own, and so has pipeline: use fsdp or "
                "tensor beside it"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        if self.num_fragments > (number := sum(p.requires_grad for p in model.parameters())):
            raise ValueError(
                f"strategy.dp.num_fragments={self.num_fragments} are more than the model's "
                f"{number} weights"
            )

    def combine_norm(self, norm: Tensor, plan: ParallelContext) -> Tensor:
        """Return the root mean square over the ranks, each of which has clipped by its own norm."""
        square = norm.square()
        dist.all_reduce(square, group=plan.mesh[self.axis].get_group())
        return (square / self.degree).sqrt()

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        return LocalSGDExecutor(self, models, optimizers, micro_batches, plan)

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        each, once = footprint.state_bytes
        outer = 2 * footprint.weight_bytes if self.remembers else 0
        return replace(footprint, state_bytes=(each + outer, once + torch.float32.itemsize))

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        if self.sync_every > 1:
            raise ValueError(
                f"local_sgd's messages are of each {self.sync_every}th step, not of every step"
            )
        sizes = [
            [weight for weight in piece.weights if weight.ready is not None]
            for piece in footprint.pieces
        ]
        elements = [sum(prod(weight.held) for weight in weights) for weights in sizes]
        return [message(self.axis, "all_reduce", elements, footprint.reduce_bytes)]


@dataclass
class PendingAllReduce:
    """A fragment's message, whose result is needed at the inner step `due`."""

    due: int
    parameters: list[nn.Parameter]
    flat: Tensor
    work: dist.Work | None


class LocalSGDExecutor(GradientAccumulation):
    """Inner steps as everywhere, outer steps between the ranks of `dp`."""

    def __init__(
        self,
        strategy: LocalSGD,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        micro_batches: int,
        plan: ParallelContext,
    ) -> None:
        super().__init__(models, micro_batches, plan)
        self.strategy, self.optimizers = strategy, optimizers
        self.group = plan.mesh[strategy.axis].get_group()
        self.states: dict[str, dict[nn.Parameter, dict[str, Tensor]]] = {
            name: {} for name in optimizers
        }
        self.underway: dict[str, list[PendingAllReduce]] = {name: [] for name in optimizers}

    @torch.no_grad()
    def step(self, model: str, optimizer: Optimizer) -> None:
        parameters, states = self._parameters(model), self.states[model]
        self._begin(model)
        optimizer.step()
        for parameter in parameters:
            states[parameter][STEPS] += 1
        done = int(states[parameters[0]][STEPS])
        every, fragments = self.strategy.sync_every, self.strategy.num_fragments
        for index in range(fragments):
            if (done + index * every // fragments) % every == 0:
                self._send(model, parameters[index::fragments], done)
        while self.underway[model] and self.underway[model][0].due <= done:
            self._receive(model, self.underway[model].pop(0))

    def _send(self, model: str, parameters: list[nn.Parameter], done: int) -> None:
        """All-reduce the fragment's pseudo-gradients, or its weights where a mean is enough."""
        if self.strategy.remembers:
            states = self.states[model]
            values = [local_part(states[p][START]) - local_part(p) for p in parameters]
            flat = torch.cat([value.flatten() for value in values])
            flat = flat.to(self.plan.precision.reduce_dtype)
        else:  # in their own format: in a narrower one they would stay rounded
            flat = torch.cat([local_part(p).flatten() for p in parameters])
        work = dist.all_reduce(flat, group=self.group, async_op=self.strategy.sync_delay > 0)
        self.underway[model].append(
            PendingAllReduce(done + self.strategy.sync_delay, parameters, flat, work)
        )

    def _receive(self, model: str, message: PendingAllReduce) -> None:
        """Take the outer step of a fragment."""
        if message.work:
            message.work.wait()
        s, states = self.strategy, self.states[model]
        sizes = [local_part(p).numel() for p in message.parameters]
        means = torch.split(message.flat / self.group.size(), sizes)
        for parameter, mean in zip(message.parameters, means, strict=True):
            weight, state = local_part(parameter), states[parameter]
            mean = mean.view_as(weight).to(weight.dtype)
            if not s.remembers:
                weight.copy_(mean)
                continue
            velocity = local_part(state[VELOCITY]).mul_(s.outer_momentum).add_(mean)
            move = mean + s.outer_momentum * velocity if s.nesterov else velocity
            start = local_part(state[START]).sub_(move, alpha=s.outer_lr)
            weight.copy_(start.lerp(weight, s.keep_local) if s.sync_delay else start)

    def _parameters(self, model: str) -> list[nn.Parameter]:
        """Return what the optimizer steps, in the model's order: the same under every plan."""
        stepped = {id(p) for group in self.optimizers[model].param_groups for p in group["params"]}
        return [p for p in self.models[model].parameters() if id(p) in stepped]

    def _begin(self, model: str) -> None:
        """Make the outer step's states, before the first inner step.

        They are apart from the optimizer's: it would take them for its own, where it has none yet.
        """
        if self.states[model]:
            return
        for parameter in self._parameters(model):
            state = self.states[model][parameter] = {STEPS: torch.zeros(())}
            if self.strategy.remembers:
                state |= {
                    START: parameter.detach().clone(),
                    VELOCITY: torch.zeros_like(parameter.detach()),
                }

    def make_states(self, model: str, optimizer: Optimizer) -> None:
        super().make_states(model, optimizer)
        self._begin(model)

    def tensors_by_kind(self, model: str) -> dict[str, list[Tensor]]:
        parameters = list[Tensor](self.models[model].parameters())
        states = [*self.optimizers[model].state.values(), *self.states[model].values()]
        values = [value for state in states for value in state.values()]
        return {
            "parameters": parameters,
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [value for value in values if isinstance(value, Tensor)],
        }

    def _live(self, model: str) -> dict[str, Tensor]:
        """Return the weights, buffers and states that there are, by their names."""
        whole = self.plan.unwrap(self.models[model])
        tensors = named_tensors(whole, self.optimizers[model])
        for name, parameter in whole.named_parameters():
            for key, value in self.states[model].get(parameter, {}).items():
                tensors[f"{OPTIMIZER_STATE}{name}.{key}"] = value
        return tensors

    @torch.no_grad()
    def evaluate(self, update: Update, batch: Batch) -> Sums:
        parameters = [p for name in self.optimizers for p in self._parameters(name)]
        own = [local_part(p).clone() for p in parameters]
        self._average(map(local_part, parameters))
        try:
            return super().evaluate(update, batch)
        finally:
            for parameter, weight in zip(parameters, own, strict=True):
                local_part(parameter).copy_(weight)

    @torch.no_grad()
    def state_tensors(self, model: str) -> dict[str, Tensor]:
        """Return the mean of each tensor over the ranks."""
        live = with_zero_states(self._live(model), self.plan.unwrap(self.models[model]), self.group)
        means = {name: tensor.detach().clone() for name, tensor in live.items()}
        self._average(map(local_part, means.values()))
        return means

    @torch.no_grad()
    def load_state_tensors(self, model: str, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self._live(model).items():
            if name in tensors:  # all but states of weights that no step has used
                tensor.copy_(tensors[name])

    def _average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in its own format. Collective."""
        for tensor in tensors:
            if tensor.is_floating_point():  # whole numbers are counts, alike on all ranks
                all_reduce_mean([tensor], self.group, tensor.dtype)
